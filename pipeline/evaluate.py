"""Measure a trained run on photos it has not learnt from: `python -m pipeline.evaluate --run RUN`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Subset

from pipeline.cli import command
from pipeline.config import DataConfig, read_config
from pipeline.data.copies import STREETVISION
from pipeline.data.dataset import METADATA_KEYS, ShardDataset, collate, photo_inputs
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.features import FeatureCache, open_cache
from pipeline.data.index import Index, read_index
from pipeline.data.inputs import check_inputs, fields_read, leaking_inputs
from pipeline.data.memory import keep_freed_memory
from pipeline.errors import UserError, require
from pipeline.files import write_summary, write_text
from pipeline.inference import kept_views, load_model, pick_device, probability_of
from pipeline.metrics import best_threshold, binary_metrics, bootstrap_intervals, has_both
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import say, track
from pipeline.report import write_report

Profile = Literal["native", "streetvision"]
BOOTSTRAP_SEED, BOOTSTRAP_ROUNDS = 0, 1000
SMALLEST_CLUSTER = 20  # labelled photos; an MCC of fewer is noise


def evaluate(
    run: Path,
    *,
    shards: str | None = None,
    features: str | None = None,
    baseline: Path | None = None,
    splits: list[str] = ["val", "test"],  # noqa: B006  (a list is what gives the flag several words)
    profile: Profile = "native",
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
) -> Path:
    """Measure a run's best weights, with and without metadata, and write its predictions and report.

    The cut is chosen on `val` with all metadata NULL, and applied everywhere. Results go into the run's
    summary.json, beside what training wrote there; predictions.csv and report.html are written anew.

    Args:
        run: Run folder.
        shards: Folder of shards, or its URL; by default the one that the run was trained on.
        features: Feature cache to take the tokens from, a folder or URL, or '' for the photos themselves; by default
            the one that the run was trained from, as far as it is still there and of these shards.
        baseline: An evaluated run on the same shards, such as one of a baseline head, to be shown beside.
        splits: Splits to measure. Without `val`, the cut is the one of an earlier evaluation or of training.
        profile: `native` measures the photos as they are; `streetvision` what the live client would send of each one,
            224 px at one of its four levels and no metadata. It has a cut, a part of summary.json and a
            predictions_streetvision.csv of its own, and the report shows its scores below the native ones.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.

    Returns:
        The path of summary.json.
    """
    require(bool(splits), "--splits", splits, "one or more of train, val, test")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    if features and profile == "streetvision":
        raise UserError(
            f"--features is {features!r}, but a feature cache holds what the live client sends of training photos "
            "alone; leave --features out with --profile streetvision"
        )
    if not run.is_dir():
        raise UserError(f"no run at {run}; name the folder that training wrote")
    start, model = time.monotonic(), load_model(run / "model", pick_device(device))
    config = read_config(run / "config.yaml")
    folder = shards or config.data.shards
    index = read_index(folder)
    check_metadata(run, index, model.config.sizes)
    for name in splits:
        check_labelled(folder, index, name)
    cache = find_cache(features, config.data, index, model) if profile == "native" else None
    sizes, scale = model.config.sizes, config.data.decode_scale
    datasets = {name: open_split(folder, index, name, sizes, scale, cache) for name in splits}
    path = run / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results = summary if profile == "native" else summary.setdefault(profile, {})
    earlier = None if "val" in splits else known_threshold(run, results)
    if profile != "native" and results.get("evaluation", {}).get("source_sha256") != index.source_sha256:
        results.clear()  # scores on other shards, which the page would show beside these
    copy = 0 if profile == "native" else STREETVISION.first
    predictions = pd.concat(
        [predict_split(model, name, dataset, batch_size, workers, copy) for name, dataset in datasets.items()],
        ignore_index=True,
    )
    threshold = choose_threshold(predictions) if earlier is None else earlier
    predictions["prediction"] = (predictions["probability_null"] > threshold).astype(int)
    wall_s = time.monotonic() - start
    for name in splits:
        rows = predictions[predictions["split"] == name].dropna(subset=["label"])
        results[name] = {**score_split(rows, threshold), "clusters": score_clusters(rows, threshold, index)}
        _tell(name if profile == "native" else f"{name}, {profile}", results[name])
    results["evaluation"] = {
        "data": index.arguments.get("source_kind", PurePosixPath(folder).name),
        "shards": folder,
        "source_sha256": index.source_sha256,
        "threshold": threshold,
        "threshold_from": "the validation split" + ("" if earlier is None else ", earlier"),
        "smallest_cluster": SMALLEST_CLUSTER,
        "bootstrap_rounds": BOOTSTRAP_ROUNDS,
        "wall_s": round(wall_s, 1),
        "images_per_s": round(len(predictions) / wall_s, 2),
    }
    write_text(run / predictions_name(profile), predictions.to_csv(index=False))
    if baseline is not None:
        results["baseline"] = compare(baseline, index, profile)
    written = write_summary(run, summary)
    shown = predictions if profile == "native" else native_predictions(run, summary, index)
    if shown is None:
        say(f"for a report, `evaluate --run {run}` first, which measures the photos as they are")
    else:
        shown_splits = datasets | {
            name: open_split(folder, index, name, sizes, scale) for name in set(shown["split"]) - set(splits)
        }
        say(f"report: {write_report(run, shown, lambda split, row: shown_splits[split].photo(row))}")
    return written


def predictions_name(profile: Profile) -> str:
    """Of the file in the run folder."""
    return "predictions.csv" if profile == "native" else f"predictions_{profile}.csv"


def native_predictions(run: Path, summary: dict[str, Any], index: Index) -> pd.DataFrame | None:
    """What an earlier evaluation of the photos as they are has written; None where there is none on these shards."""
    path = run / predictions_name("native")
    if summary.get("evaluation", {}).get("source_sha256") != index.source_sha256 or not path.is_file():
        return None
    types: Any = {"split": str, "key": str, "source": str, "label": "Int64", "kept_views": str}
    return pd.read_csv(path, dtype=types)


def check_labelled(folder: str, index: Index, name: str) -> None:
    """Refuse a split where nothing is labelled, before any time is spent on it."""
    if not (index.split(name).labels >= 0).any():
        raise UserError(f"the split {name!r} of {folder} has no labelled photo, so there is nothing to measure on it")


def find_cache(given: str | None, data: DataConfig, index: Index, model: RoadworkModel) -> FeatureCache | None:
    """The feature cache to evaluate from; None where the tokens are to be computed.

    Args:
        given: What the user asked for; None leaves it to the run.
        data: Of the run.
        index: Of the shards.
        model: The one to be evaluated.

    Raises:
        UserError: The user asked for a cache that does not fit. The run's own is then passed over, with a word.
    """
    try:
        cache = open_cache(data.features if given is None else given, index)
        if cache is not None:
            cache.check(feature_key(model.backbone, model.config.sizes, data.decode_scale))
    except UserError as problem:
        if given is not None:
            raise
        say(f"computing the tokens anew: {problem}")
        return None
    return cache


def check_metadata(run: Path, index: Index, model: ModelConfig) -> None:
    """See `check_inputs`. A leak is told and no more: the headline is the score with all metadata NULL."""
    weights = None
    if "text" in fields_read(model):
        weights = json.loads((run / "provenance.json").read_text())["data"]["arguments"]["text_encoder"]
    check_inputs(index, model, allow_leaks=True, text_encoder=weights)
    for name, why in leaking_inputs(index, model).items():
        say(f"do not trust the score with metadata: in these shards {name} gives the label away ({why})")


def compare(baseline: Path, index: Index, profile: Profile = "native") -> dict[str, Any]:
    """The headline of another run in the same profile, for the summary of this one.

    Raises:
        UserError: It is not evaluated on the test split, or its shards are others.
    """
    path = baseline / "summary.json"
    other = json.loads(path.read_text()) if path.is_file() else {}
    flags = "" if profile == "native" else f" --profile {profile}"
    other = other if profile == "native" else other.get(profile, {})
    if "test" not in other:
        raise UserError(
            f"the baseline {baseline} has no evaluation on test; run `evaluate --run {baseline}{flags}` first"
        )
    if other["evaluation"]["source_sha256"] != index.source_sha256:
        raise UserError(f"the baseline {baseline} was evaluated on other shards, so the two cannot be compared")
    return {
        "run": str(baseline),
        "head": read_config(baseline / "config.yaml").model.head,
        "mcc": other["test"]["mcc_null_metadata"],
        "ci95": other["test"]["ci95"]["mcc_null_metadata"],
    }


def known_threshold(run: Path, summary: dict[str, Any]) -> float:
    """The cut of an earlier evaluation, or of the best validation in training.

    Raises:
        UserError: The run knows none.
    """
    if "evaluation" in summary:
        return float(summary["evaluation"]["threshold"])
    if summary.get("best"):
        return float(summary["best"]["val"]["threshold"])
    raise UserError(f"{run} has no threshold yet; evaluate it with `val` among the --splits, on which it is chosen")


def choose_threshold(predictions: pd.DataFrame) -> float:
    """The cut with the best MCC on validation, metadata NULL: the regime of the headline and of live use."""
    rows = predictions[predictions["split"] == "val"].dropna(subset=["label"])
    return best_threshold(rows["label"].to_numpy(np.int64), rows["probability_null"].to_numpy())


def predict_split(
    model: RoadworkModel, name: str, dataset: ShardDataset, batch_size: int, workers: int, copy: int = 0
) -> pd.DataFrame:
    """Probabilities with and without metadata for every sample of a split, or for a copy of each, labelled or not.

    Returns:
        The columns of predictions.csv but `prediction`, in the order of the shards; `label` is NA where
        unknown.
    """
    numbers = range(copy * len(dataset), (copy + 1) * len(dataset))
    loader = DataLoader(
        Subset(dataset, numbers),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=keep_freed_memory,
    )
    found = list(track(answers(model, loader), len(dataset), f"evaluating {name}"))
    samples = dataset.split.samples
    return pd.DataFrame(
        {
            "split": name,
            "key": [sample.key for sample in samples],
            "source": [dataset.record(row).source for row in range(len(samples))],
            "label": pd.array([sample.label for sample in samples], dtype="Int64"),
            "probability_null": [answer[0] for answer in found],
            "probability": [answer[1] for answer in found],
            "group": [sample.group for sample in samples],
            "cluster": [sample.cluster for sample in samples],
            "kept_views": [";".join(answer[2]) for answer in found],
        }
    )


@torch.inference_mode()
def answers(
    model: RoadworkModel, loader: DataLoader[dict[str, torch.Tensor]]
) -> Iterator[tuple[float, float, list[str]]]:
    """Per photo the probability with metadata NULL, that with metadata, and the kept views.

    One pass of the backbone serves both. The probabilities are those before the decision bias, so that an
    exported model gets the same evaluation.
    """
    for batch in loader:
        inputs: dict[str, Any] = photo_inputs(batch)
        encoded = model.encode(**inputs)
        blind = model.answer(encoded, null_metadata=True)
        metadata = {key: batch[key] for key in METADATA_KEYS}
        informed = model.answer(encoded, batch["null_metadata"], **metadata)
        probabilities = [probability_of(model, output, 0.0) for output in (blind, informed)]
        yield from zip(*probabilities, kept_views(blind), strict=True)


def score_split(rows: pd.DataFrame, threshold: float) -> dict[str, Any]:
    """The summary of one split: everything with metadata NULL, and beside it the MCC with metadata.

    Args:
        rows: Labelled predictions, at least one.
        threshold: The cut.
    """
    labels, groups = rows["label"].to_numpy(np.int64), rows["group"].to_numpy()
    blind, informed = rows["probability_null"].to_numpy(), rows["probability"].to_numpy()
    scores = binary_metrics(labels, blind, threshold)
    intervals, with_metadata = (
        bootstrap_intervals(labels, probabilities, groups, threshold, seed=BOOTSTRAP_SEED, rounds=BOOTSTRAP_ROUNDS)
        for probabilities in (blind, informed)
    )
    return {
        **scores,
        "mcc": binary_metrics(labels, informed, threshold)["mcc"],
        "mcc_null_metadata": scores["mcc"],
        "ci95": {**intervals, "mcc": with_metadata["mcc"], "mcc_null_metadata": intervals["mcc"]},
    }


def score_clusters(rows: pd.DataFrame, threshold: float, index: Index) -> list[dict[str, Any]]:
    """MCC and accuracy of each GPS cluster that is large enough, metadata NULL, worst first.

    Clusters with one class have no MCC and come last.
    """
    found = []
    for number, part in rows.groupby("cluster"):
        if len(part) < SMALLEST_CLUSTER:
            continue
        labels = part["label"].to_numpy(np.int64)
        scores = binary_metrics(labels, part["probability_null"].to_numpy(), threshold)
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


def _tell(name: str, scores: dict[str, Any]) -> None:
    bounds = scores["ci95"]["mcc_null_metadata"]
    interval = f", 95 % interval {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
    say(
        f"{name}: MCC {scores['mcc_null_metadata']:.3f}{interval} (metadata NULL, n={scores['n']}); "
        f"{scores['mcc']:.3f} with metadata"
    )


if __name__ == "__main__":
    raise SystemExit(command(evaluate))
