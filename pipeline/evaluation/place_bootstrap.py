"""How far a score holds for other places and other seeds: the cluster bootstrap over both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from pipeline.evaluation.metrics import confusion_counts, mcc_of

ROUNDS = 4000
LEVEL = 0.95
FEWEST_PLACES = 5  # with fewer the bootstrap draws groups of near-duplicates in their place
ENSEMBLES = 200  # drawn sets of heads that share the rounds


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class PlaceBootstrap:
    """Draws whole places with replacement, and seeds, the same ones for everything that is compared.

    Photos of one city resemble each other, so a new city is the unit that a result has to hold for. With G places the
    percentile interval of the bootstrap is too narrow by about sqrt((G - 1) / G), and a normal tail where Student's t
    belongs. The percentiles are moved out accordingly (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 3.3, "expanded percentile"), and the part of the seeds is widened in the same way.
    """

    def __init__(self, units: np.ndarray, seeds: int, seed: int = 0):
        """Draw nothing yet.

        Args:
            units: Number of each photo's unit (place or group), of which whole ones are drawn: int64 [N].
            seeds: Number S of trainings that differ in their seeds only.
            seed: Seed of the draws.
        """
        self.units, self.seed = units, seed
        self.seed_draws = np.random.default_rng([seed, 1]).integers(seeds, size=(ROUNDS, seeds))
        # Drawing S of S seeds varies less than S new ones would, by (S - 1) / S in variance.
        self.widening = float(np.sqrt(seeds / max(seeds - 1, 1)))

    @cache  # noqa: B019  (there are few of them, and they live as long as the program)
    def _draws(self, present: tuple[int, ...]) -> np.ndarray:
        """How often each unit is drawn, [ROUNDS, units]: whole numbers, as floats for a fast product."""
        count, generator = len(present), np.random.default_rng([self.seed, 0])
        return generator.multinomial(count, np.full(count, 1 / count), size=ROUNDS).astype(np.float64)

    def mcc_draws(self, outcomes: np.ndarray, rows: np.ndarray) -> tuple[float, np.ndarray, int]:
        """The MCC over the given rows, as the mean over seeds.

        Args:
            outcomes: int64 [S, N, 4], see `confusion_counts`.
            rows: bool [N], the photos that count.

        Returns:
            The MCC of the photos at hand, the MCC of every draw [ROUNDS], and the number of units.
        """
        present, unit = np.unique(self.units[rows], return_inverse=True)
        counts = np.zeros((len(present), *outcomes.shape[::2]), dtype=np.int64)  # [units, S, 4]
        np.add.at(counts, unit.ravel(), outcomes[:, rows].transpose(1, 0, 2))
        drawn = self._draws(tuple(present.tolist())) @ counts.reshape(len(present), -1).astype(np.float64)
        drawn = drawn.reshape(ROUNDS, *counts.shape[1:])
        observed = mcc_of(*counts.sum(axis=0).T)
        return float(observed.mean()), self._over_seeds(mcc_of(*np.moveaxis(drawn, -1, 0))), len(present)

    def _over_seeds(self, of_seeds: np.ndarray) -> np.ndarray:
        """Means over drawn seeds, [ROUNDS], of [ROUNDS, S] values."""
        middle, by_seed = of_seeds.mean(axis=1), np.take_along_axis(of_seeds, self.seed_draws, axis=1)
        drawn: np.ndarray = middle + self.widening * (by_seed.mean(axis=1) - middle)
        return drawn

    def mcc_of_heads(self, outcomes: np.ndarray) -> Estimate:
        """The MCC of one head, as the mean over S heads that were tested on the same N photos.

        Args:
            outcomes: int64 [S, N, 4], see `confusion_counts`.
        """
        value, draws, _ = self.mcc_draws(outcomes, np.ones(outcomes.shape[1], dtype=bool))
        return Estimate(value, *expanded(draws, effective_units(self.units)))

    def mcc_of_ensemble(self, labels: np.ndarray, log_odds: np.ndarray, cuts: np.ndarray) -> Estimate:
        """The MCC of the mean log-odds of S heads.

        Heads that are drawn with replacement repeat, and an ensemble with repeats is worse. This bias is taken off:
        only the differences among drawn ensembles count, widened as in the mean over seeds.

        Args:
            labels: 0 or 1, [N].
            log_odds: Log-odds of each head, [S, N].
            cuts: The cut of each photo's fold, in log-odds, [N].
        """
        present, unit = np.unique(self.units, return_inverse=True)
        draws = self._draws(tuple(present.tolist()))

        def counts(heads: np.ndarray) -> np.ndarray:
            """Outcomes in each unit, float64 [units, 4], of the ensemble of some heads."""
            above = log_odds[heads].mean(axis=0) - cuts
            outcomes = confusion_counts(labels, above, 0.0).argmax(axis=1)
            cells = np.bincount(4 * unit.ravel() + outcomes, minlength=4 * len(present))
            return cells.reshape(-1, 4).astype(np.float64)

        whole = counts(np.arange(len(log_odds)))
        value, drawn = float(mcc_of(*whole.sum(axis=0))), mcc_of(*(draws @ whole).T)
        if len(log_odds) > 1:
            others = [counts(heads) for heads in self.seed_draws[:ENSEMBLES]]
            bias = np.mean([mcc_of(*other.sum(axis=0)) for other in others]) - value
            for first, other in enumerate(others):
                rounds = slice(first, None, ENSEMBLES)
                difference = mcc_of(*(draws[rounds] @ other).T) - drawn[rounds] - bias
                drawn[rounds] += self.widening * difference
        return Estimate(value, *expanded(drawn, effective_units(self.units)))

    def mean(self, values: np.ndarray, rows: np.ndarray) -> Estimate:
        """The mean of [S, N] values over seeds and over the photos where bool [N] is true."""
        present, unit = np.unique(self.units[rows], return_inverse=True)
        sums = np.zeros((len(present), len(values)))
        np.add.at(sums, unit.ravel(), values[:, rows].T)
        drawn = self._draws(tuple(present.tolist()))
        of_seeds = drawn @ sums / (drawn @ np.bincount(unit.ravel()))[:, None]
        return Estimate(float(values[:, rows].mean()), *expanded(self._over_seeds(of_seeds), len(present)))


def effective_units(units: np.ndarray) -> float:
    """The number of equally large units that would say as much as these (Kish 1965, "Survey Sampling").

    A few cities and many single photos are hardly more places than the few cities are.

    Args:
        units: Number of each photo's unit, int64 [N].
    """
    _, photos = np.unique(units, return_counts=True)
    return float(photos.sum() ** 2 / (photos**2).sum())


def expanded(draws: np.ndarray, units: float) -> tuple[float, float]:
    """The expanded percentile interval of draws over so many units, see `PlaceBootstrap`; unbounded below two."""
    if units < 2:
        return -np.inf, np.inf
    tail = expanded_tail(units)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(units: float) -> float:
    """Probability outside each end of the interval."""
    quantile = np.sqrt(units / (units - 1)) * stats.t.ppf((1 + LEVEL) / 2, units - 1)
    return float(stats.norm.cdf(-quantile))


def bootstrap_units(places: np.ndarray, groups: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, str]:
    """The units to draw, places, or groups of near-duplicates where too few places are tested; and their name.

    Args:
        places: Number of each photo's place, int64 [N].
        groups: Number of each photo's group, int64 [N].
        tested: Photos that count, bool [N].
    """
    if len(np.unique(places[tested])) >= FEWEST_PLACES:
        return places, "places"
    return groups, "groups of near-duplicates"
