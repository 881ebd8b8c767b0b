"""Measure a trained run on photos that it was not trained on: `python -m pipeline.evaluate --run RUN`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import command
from pipeline.errors import UserError, require
from pipeline.names import Profile

if TYPE_CHECKING:
    from pipeline.data.dataset import ShardDataset
    from pipeline.data.features import FeatureCache
    from pipeline.data.index import Index
    from pipeline.evaluation.calibration import Calibration
    from pipeline.evaluation.scoring import Answer
    from pipeline.model.roadwork import RoadworkModel
    from pipeline.training.run_folder import RunFolder


def evaluate(
    run: Path,
    *,
    shards: str | None = None,
    features: str | None = None,
    baseline: Path | None = None,
    splits: list[str] = ["val", "test"],  # noqa: B006  (a list is what gives the flag several words)
    profile: Profile = "native",
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "auto",
    backbone: str | None = None,
) -> Path:
    """Measure a run's best weights, with and without metadata, and write its predictions and report.

    Probabilities are calibrated on `val` with all metadata NULL: 0.5 is the best cut, and their slope around it has the
    highest likelihood. All splits get this calibration; the scores of `val` itself are cross-fitted, each photo by cuts
    and slopes that were fitted without it. Results are added to the run's summary.json; predictions.csv and
    report.html are written anew. Under a launcher any number of processes share the photos, and the results are the
    same.

    Args:
        run: Run folder.
        shards: Folder of shards, or its URL; by default the one that the run was trained on.
        features: Folder or URL of a feature cache to take the tokens from, or '' for the photos themselves; by default
            the cache that the run was trained from, if it still exists and is of these shards.
        baseline: Another evaluated run on the same shards, such as one of a baseline head, to show beside this one.
        splits: Splits to measure. Without `val`, the calibration is that of an earlier evaluation or of training.
        profile: `native` measures the photos as they are; `streetvision` as the NATIX challenge sent them in its older
            form: 224 px, at one of four levels of degradation, without metadata. (It stopped sending work in May 2026.)
            The profile `streetvision` has its own calibration, summary, predictions and report in RUN/streetvision. A
            native report that is written later shows its scores too.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views, for each process that computes; 0 does it in this one; by
            default one for each spare core.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.
        backbone: Where the backbone is now, if it has moved: a folder, a hub id or scenes-tiny. It must be the one of
            training.

    Returns:
        The path of summary.json.
    """
    require(bool(splits), "--splits", splits, "one or more of train, val, test")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers is None or workers >= 0, "--workers", workers, "0 or more")
    native = profile == "native"
    if features and not native:
        raise UserError(
            f"--features is {features!r}, but a feature cache holds `streetvision` copies of training photos only; "
            "leave --features out with --profile streetvision"
        )
    import torch.distributed as dist  # takes seconds, which --help should not wait for

    from pipeline.data.copies import STREETVISION
    from pipeline.data.feature_dataset import open_split
    from pipeline.data.folds import read_dealt
    from pipeline.devices import out_of_memory, spare_cores
    from pipeline.distributed.agreement import gather, on_rank_zero
    from pipeline.distributed.processes import interrupted_by_signals, processes
    from pipeline.evaluation.dealing import undeal
    from pipeline.evaluation.scoring import answer_split
    from pipeline.training.run_folder import RunFolder

    start, folder = time.monotonic(), RunFolder.open(run)
    with interrupted_by_signals(), processes(device) as chosen:
        config, model = folder.config(), folder.load_model(chosen, backbone)
        place = shards or config.data.shards
        # The run of a fold is measured on its own splits.
        index = read_dealt(place, "" if shards else config.data.folds, config.data.fold)
        subject = _Subject(folder, model, place, index, splits, profile)
        cache, beside, earlier = on_rank_zero(lambda: subject.check(features, config.data.features, baseline))
        datasets = {name: open_split(place, index, name, model.config.input_spec, cache) for name in splits}
        sizes = batch_size, spare_cores(chosen) if workers is None else workers, 0 if native else STREETVISION.first
        process = dist.get_rank(), dist.get_world_size()
        with out_of_memory("--batch_size"):
            answers = {
                name: undeal(gather(answer_split(model, data, *sizes, *process)), batch_size)
                for name, data in datasets.items()
            }
        return on_rank_zero(lambda: subject.report(datasets, answers, beside, earlier, start))


@dataclass(frozen=True)
class _Subject:
    """What is measured; `check` is done before the photos are answered for, and `report` afterwards."""

    folder: RunFolder
    model: RoadworkModel
    place: str
    index: Index
    splits: list[str]
    profile: Profile

    def check(
        self, features: str | None, configured: str, baseline: Path | None
    ) -> tuple[FeatureCache | None, dict[str, Any] | None, Calibration | None]:
        """Refuse what cannot be measured.

        Args:
            features: The user's choice of a cache, see `evaluate`.
            configured: The run's cache.
            baseline: A run to compare with.

        Returns:
            The feature cache, the scores of the baseline, and the calibration that is known without `val`, if any.
        """
        from pipeline.evaluation import scoring
        from pipeline.evaluation.results import read_results

        scoring.check_metadata(self.index, self.model.config.sizes, self.folder.text_encoder())
        for name in self.splits:
            scoring.check_labelled(self.place, self.index, name)
        beside = cache = known = None
        if baseline is not None:
            beside = scoring.compare(baseline, read_results(baseline, self.profile), self.index, self.profile)
        if self.profile == "native":
            cache = scoring.find_cache(features, configured, self.index, self.model)
        if "val" not in self.splits:
            results = self.folder.results(self.profile)
            known = scoring.known_calibration(self.folder.path, results, self.model, self.profile)
        return cache, beside, known

    def report(
        self, datasets: dict[str, ShardDataset], answers: dict[str, list[Answer]], beside: dict[str, Any] | None,
        earlier: Calibration | None, start: float,
    ) -> Path:  # fmt: skip
        """Calibrate, score, and write predictions, summary and report.

        Args:
            datasets: The splits, by name.
            answers: The answers for each of them.
            beside: The scores of the baseline.
            earlier: The calibration to use; None to fit one.
            start: Start of the evaluation on the monotonic clock.
        """
        import pandas as pd

        from pipeline.evaluation import scoring
        from pipeline.evaluation.inference import evidence_map
        from pipeline.evaluation.report import write_report
        from pipeline.evaluation.results import without_stale
        from pipeline.files import write_summary, write_text
        from pipeline.progress import say

        model, native = self.model, self.profile == "native"
        tables = [scoring.table_of(data, answers[name]) for name, data in datasets.items()]
        predictions = pd.concat(tables, ignore_index=True)
        calibration = scoring.fit_calibration(predictions) if earlier is None else earlier
        predictions = scoring.calibrate(predictions, calibration)
        wall_s, known = time.monotonic() - start, earlier is not None
        about = scoring.describe(self.index, self.place, model, calibration, known, len(predictions), wall_s)
        results = {**without_stale(self.folder.results(self.profile), about), "evaluation": about}
        for name in self.splits:
            rows = predictions[predictions["split"] == name].dropna(subset=["label"])
            rows = scoring.held_out(rows) if name == "val" else rows
            results[name] = {**scoring.score_split(rows), "clusters": scoring.score_clusters(rows, self.index)}
            say(scoring.in_words(name if native else f"{name}, {self.profile}", results[name]))
        if beside is not None:
            results["baseline"] = beside
        out = self.folder.profile(self.profile)
        write_text(out / "predictions.csv", predictions.to_csv(index=False))
        written = write_summary(out, results)
        page = write_report(
            self.folder.path, self.profile, predictions, lambda split, row: datasets[split].photo(row),
            lambda split, row: evidence_map(model, datasets[split][row]) if native else None,
        )  # fmt: skip
        say(f"report: {page}")
        return written


if __name__ == "__main__":
    raise SystemExit(command(evaluate, "evaluate"))
