"""A model's answers on a split, and how good they are: predictions, calibration, metrics with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch.utils.data import Dataset, Subset

from pipeline.config import read_config
from pipeline.data.batch import Batch, batches_of, collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_key import feature_key
from pipeline.data.features import FeatureCache, open_cache
from pipeline.data.index import Index
from pipeline.data.inputs import check_inputs, leaking_inputs
from pipeline.errors import UserError, typed
from pipeline.evaluation.calibration import Calibration, check_finite, fit, out_of_fold
from pipeline.evaluation.dealing import deal
from pipeline.evaluation.inference import fingerprint, kept_views
from pipeline.evaluation.metrics import DEFAULT_THRESHOLD, binary_metrics, bootstrap_intervals, has_both
from pipeline.evaluation.reliability import FEWEST_PLACES, calibration_scores
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import Profile
from pipeline.progress import say, track

BOOTSTRAP_SEED, BOOTSTRAP_ROUNDS = 0, 1000
SMALLEST_CLUSTER = 20  # labelled photos; an MCC of fewer is noise
Answer = tuple[str, float, float, list[str]]  # see `answers`


class WithSource(Dataset[tuple[Batch, str]]):
    """The samples of a split, or a copy of each, together with each photo's source."""

    def __init__(self, data: ShardDataset, copy: int = 0):
        self.data, self.first = data, copy * len(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Batch, str]:
        """See `ShardDataset.load`."""
        record, sample = self.data.load(self.first + row)
        return sample, record.source


def collate_with_source(samples: list[tuple[Batch, str]]) -> tuple[Batch, list[str]]:
    """See `collate`."""
    return collate([sample for sample, _ in samples]), [source for _, source in samples]


def answer_split(
    model: RoadworkModel, dataset: ShardDataset, batch_size: int, workers: int, copy: int, rank: int, world_size: int
) -> list[Answer]:
    """A process's share of a split's answers; see `table_of` for all of them together.

    Args:
        model: The model.
        dataset: The split.
        batch_size: Photos in one forward pass.
        workers: Processes that read; 0 reads in this one.
        copy: 0 for the photos themselves, see `make_copy` for others.
        rank: This process's number; the first one shows how far it is.
        world_size: Number of processes that share the split.
    """
    share = deal(len(dataset), batch_size, rank, world_size)
    data = Subset(WithSource(dataset, copy), share)
    found = answers(model, batches_of(data, batch_size, workers, collate_with_source))
    if rank == 0:
        what = f"evaluating {dataset.name}" + (f", process 1 of {world_size}" if world_size > 1 else "")
        found = track(found, len(share), what)
    return list(found)


def table_of(dataset: ShardDataset, found: Sequence[Answer]) -> pd.DataFrame:
    """Log-odds with and without metadata for every sample of a split, or for a copy of each, labelled or not.

    Args:
        dataset: The split.
        found: The answers for all of its samples, in their order.

    Returns:
        The columns of predictions.csv but those that `calibrate` adds, in the order of the shards; `label` is NA where
        unknown.

    Raises:
        UserError: Some of the log-odds are no numbers.
    """
    samples = dataset.split.samples
    keys = [sample.key for sample in samples]
    for column in (1, 2):
        check_finite(np.array([answer[column] for answer in found]), keys, f"the model, in the split {dataset.name!r},")
    return pd.DataFrame(
        {
            "split": dataset.name,
            "key": keys,
            "source": [answer[0] for answer in found],
            "label": pd.array([sample.label for sample in samples], dtype="Int64"),
            "log_odds_null": [answer[1] for answer in found],
            "log_odds": [answer[2] for answer in found],
            "group": [sample.group for sample in samples],
            "cluster": [sample.cluster for sample in samples],
            "kept_views": [";".join(answer[3]) for answer in found],
        }
    )


@torch.inference_mode()
def answers(model: RoadworkModel, loader: Iterable[tuple[Batch, list[str]]]) -> Iterator[Answer]:
    """The source, the log-odds with metadata NULL, those with metadata, and the kept views of each photo.

    One pass of the backbone gives both. No calibration is in them, so an exported model gets the same evaluation.
    """
    for batch, sources in loader:
        encoded = model.encode(batch)
        blind = model.answer(encoded, null_metadata=True)
        informed = model.answer(encoded, batch, batch["null_metadata"])
        # In one tensor, since every list of a tensor makes the host wait for a GPU.
        log_odds = torch.stack([model.log_odds(output) for output in (blind, informed)]).tolist()
        yield from zip(sources, *log_odds, kept_views(blind), strict=True)


def check_labelled(folder: str, index: Index, name: str) -> None:
    """Refuse a split where nothing is labelled, before any time is spent on it."""
    if not (index.split(name).labels >= 0).any():
        raise UserError(f"the split {name!r} of {folder} has no labelled photo, so there is nothing to measure on it")


def check_metadata(index: Index, model: ModelConfig, text_encoder: str | None) -> None:
    """Check the metadata as `check_inputs` does, but only warn of a leak: the headline has all metadata NULL."""
    check_inputs(index, model, allow_leaks=True, text_encoder=text_encoder)
    for name, why in leaking_inputs(index, model).items():
        say(f"do not trust the score with metadata: in these shards {name} gives the label away ({why})")


def find_cache(given: str | None, features: str, index: Index, model: RoadworkModel) -> FeatureCache | None:
    """The feature cache to evaluate from; None where the tokens are to be computed.

    Args:
        given: The user's choice; None leaves it to the run.
        features: The run's `data.features`.
        index: The shards' index.
        model: The model to evaluate.

    Raises:
        UserError: The user's choice does not fit. (A run's own cache that does not fit is ignored with a message.)
    """
    try:
        cache = open_cache(features if given is None else given, index)
        if cache is not None:
            cache.check(feature_key(model.backbone, model.config.input_spec, model.config.pool_grid))
    except UserError as problem:
        if given is not None:
            raise
        say(f"computing the tokens anew: {problem}")
        return None
    return cache


def known_calibration(
    run: Path, results: dict[str, Any], model: RoadworkModel, profile: Profile = "native"
) -> Calibration:
    """The calibration by an earlier evaluation, or by the best validation in training.

    Args:
        run: The run folder, for messages.
        results: Its summary.
        model: The model in it.
        profile: The profile whose summary it is.

    Raises:
        UserError: There is none, or it is of another model than the one that is in the folder now.
    """
    again = f"run `{typed(f'evaluate --run {run}')}{flags_of(profile)}`"
    found = results.get("evaluation", {})
    if found:
        if "cut" not in found:
            raise UserError(f"{run} was evaluated by an older version, which did not calibrate probabilities; {again}")
        if found["model_sha256"] != fingerprint(model):
            raise UserError(f"the model in {run} has changed since it was evaluated; {again} once more")
        return Calibration(found["cut"], found["slope"])
    trained = (results.get("best") or {}).get("val", {})
    if "cut" in trained:
        if "calibration" in results:
            raise UserError(f"the command early-exit has changed the model in {run} since it was trained; {again}")
        return Calibration(trained["cut"], trained["slope"])
    raise UserError(f"{run} has no calibration yet; {again} with `val` among the --splits, on which it is fitted")


def fit_calibration(predictions: pd.DataFrame) -> Calibration:
    """The calibration by the labelled photos of validation, with metadata NULL as in the headline."""
    rows = predictions[predictions["split"] == "val"].dropna(subset=["label"])
    return fit(rows["label"].to_numpy(np.int64), rows["log_odds_null"].to_numpy(np.float64))


def calibrate(predictions: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """The rows of predictions.csv: with calibrated probabilities, and the answer with metadata NULL."""
    found = predictions.copy()
    for place, ending in ((4, "_null"), (5, "")):
        found.insert(place, f"probability{ending}", calibration.probability(found[f"log_odds{ending}"].to_numpy()))
    return found.assign(prediction=(found["probability_null"] > DEFAULT_THRESHOLD).astype(int))


def held_out(rows: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows of validation with probabilities by calibrations that did not see them; see `cross_fit`."""
    columns = (rows["label"].to_numpy(np.int64), rows["log_odds_null"].to_numpy(np.float64), rows["group"].to_numpy())
    cuts, slopes = out_of_fold(*columns)
    return rows.assign(
        probability_null=expit(slopes * (rows["log_odds_null"] - cuts)),
        probability=expit(slopes * (rows["log_odds"] - cuts)),
    )


def score_split(rows: pd.DataFrame) -> dict[str, Any]:
    """The summary of one split: everything with metadata NULL, and beside it the MCC with metadata.

    Args:
        rows: Labelled predictions, at least one.
    """
    labels, groups = rows["label"].to_numpy(np.int64), rows["group"].to_numpy()
    blind, informed = rows["probability_null"].to_numpy(), rows["probability"].to_numpy()
    log_odds, clusters = rows["log_odds_null"].to_numpy(np.float64), rows["cluster"].to_numpy()
    scores = binary_metrics(labels, blind, ranking=log_odds)
    intervals, with_metadata = (
        bootstrap_intervals(
            labels, probabilities, groups, ranking=ranking, seed=BOOTSTRAP_SEED, rounds=BOOTSTRAP_ROUNDS
        )
        for probabilities, ranking in ((blind, log_odds), (informed, rows["log_odds"].to_numpy(np.float64)))
    )
    # Photos without GPS are in cluster 0, which is no place. Very few places say nothing about others.
    places = np.where(clusters > 0, -clusters, groups)
    places = places if len(np.unique(places)) >= FEWEST_PLACES else groups
    return {
        **scores,
        "mcc": binary_metrics(labels, informed)["mcc"],
        "mcc_null_metadata": scores["mcc"],
        "ci95": {**intervals, "mcc": with_metadata["mcc"], "mcc_null_metadata": intervals["mcc"]},
        "calibration": calibration_scores(labels, blind, log_odds, places),
    }


def score_clusters(rows: pd.DataFrame, index: Index) -> list[dict[str, Any]]:
    """MCC and accuracy of each GPS cluster that is large enough, with metadata NULL, worst first.

    Clusters with one class have no MCC and come last.
    """
    found = []
    for number, part in rows.groupby("cluster"):
        if len(part) < SMALLEST_CLUSTER:
            continue
        labels = part["label"].to_numpy(np.int64)
        scores = binary_metrics(labels, part["probability_null"].to_numpy())
        found.append(
            {
                "cluster": int(str(number)),
                "centre": index.clusters[int(str(number))].centre,
                "n": len(part),
                "roadwork": int(labels.sum()),
                "mcc": scores["mcc"] if has_both(labels) else None,
                "accuracy": scores["accuracy"],
            }
        )
    return sorted(found, key=lambda place: (place["mcc"] is None, place["mcc"] or 0.0, place["accuracy"]))


def flags_of(profile: Profile) -> str:
    """What a command line has besides the run for an evaluation in a profile."""
    return "" if profile == "native" else f" --profile {profile}"


def compare(run: Path, results: dict[str, Any], index: Index, profile: Profile) -> dict[str, Any]:
    """The headline of another run in the same profile, for the summary of this one.

    Raises:
        UserError: That run was not evaluated on the test split, or was evaluated on other shards.
    """
    if "test" not in results:
        again = f"evaluate --run {run}{flags_of(profile)}"
        raise UserError(f"the baseline {run} has no evaluation on test; run `{again}` first")
    if results["evaluation"]["source_sha256"] != index.source_sha256:
        raise UserError(f"the baseline {run} was evaluated on other shards, so the two cannot be compared")
    return {
        "run": str(run),
        "head": read_config(run / "config.yaml").model.head,
        "mcc": results["test"]["mcc_null_metadata"],
        "ci95": results["test"]["ci95"]["mcc_null_metadata"],
    }


def describe(
    index: Index, place: str, model: RoadworkModel, calibration: Calibration, from_earlier: bool, photos: int,
    wall_s: float,
) -> dict[str, Any]:  # fmt: skip
    """The part of summary.json about an evaluation as a whole.

    Args:
        index: The shards' index.
        place: Folder or URL of the shards.
        model: The model.
        calibration: Its calibration.
        from_earlier: Whether the calibration is that of an earlier evaluation or of training.
        photos: Number of photos that were evaluated.
        wall_s: Seconds that it took.
    """
    return {
        "data": index.arguments.get("source_kind", PurePosixPath(place).name),
        "shards": place,
        "source_sha256": index.source_sha256,
        "model_sha256": fingerprint(model),
        **asdict(calibration),
        "calibrated_on": "the validation split" + (", earlier" if from_earlier else ""),
        "smallest_cluster": SMALLEST_CLUSTER,
        "bootstrap_rounds": BOOTSTRAP_ROUNDS,
        "wall_s": round(wall_s, 1),
        "images_per_s": round(photos / wall_s, 2),
    }


def in_words(name: str, scores: dict[str, Any]) -> str:
    """A split's scores in one readable line."""
    bounds = scores["ci95"]["mcc_null_metadata"]
    interval = f", 95 % interval {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
    return (
        f"{name}: MCC {scores['mcc_null_metadata']:.3f}{interval} (metadata NULL, n={scores['n']}); "
        f"{scores['mcc']:.3f} with metadata"
    )
