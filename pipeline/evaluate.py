"""Measure a trained run on photos that it was not trained on: `python -m pipeline.evaluate --run RUN`."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.cli import command
from pipeline.errors import UserError, require
from pipeline.names import Profile


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

    Probabilities are calibrated on `val` with all metadata NULL: 0.5 is the best cut, and their slope around it has the
    highest likelihood. All splits get this calibration; the scores of `val` itself are cross-fitted, each photo by cuts
    and slopes that were fitted without it. Results are added to the run's summary.json; predictions.csv and
    report.html are written anew.

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
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.

    Returns:
        The path of summary.json.
    """
    require(bool(splits), "--splits", splits, "one or more of train, val, test")
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    native = profile == "native"
    if features and not native:
        raise UserError(
            f"--features is {features!r}, but a feature cache holds `streetvision` copies of training photos only; "
            "leave --features out with --profile streetvision"
        )
    import pandas as pd  # takes seconds, which --help should not wait for

    from pipeline.data.copies import STREETVISION
    from pipeline.data.feature_dataset import open_split
    from pipeline.data.folds import read_dealt
    from pipeline.devices import pick_device
    from pipeline.evaluation import scoring
    from pipeline.evaluation.inference import evidence_map
    from pipeline.evaluation.report import write_report
    from pipeline.evaluation.results import without_stale
    from pipeline.files import write_summary, write_text
    from pipeline.progress import say
    from pipeline.training.run_folder import RunFolder

    start, folder = time.monotonic(), RunFolder.open(run)
    config, model = folder.config(), folder.load_model(pick_device(device))
    place = shards or config.data.shards
    # The run of a fold is measured on its own splits.
    index = read_dealt(place, "" if shards else config.data.folds, config.data.fold)
    scoring.check_metadata(index, model.config.sizes, folder.text_encoder())
    for name in splits:
        scoring.check_labelled(place, index, name)
    beside = baseline and scoring.compare(baseline, RunFolder(baseline).results(profile), index, profile)
    cache = scoring.find_cache(features, config.data.features, index, model) if native else None
    datasets = {name: open_split(place, index, name, model.config.input_spec, cache) for name in splits}
    results = folder.results(profile)
    earlier = None if "val" in splits else scoring.known_calibration(run, results, model, profile)
    copy = 0 if native else STREETVISION.first
    parts = [scoring.predict_split(model, dataset, batch_size, workers, copy) for dataset in datasets.values()]
    predictions = pd.concat(parts, ignore_index=True)
    calibration = scoring.fit_calibration(predictions) if earlier is None else earlier
    predictions = scoring.calibrate(predictions, calibration)
    wall_s = time.monotonic() - start
    about = scoring.describe(index, place, model, calibration, earlier is not None, len(predictions), wall_s)
    results = {**without_stale(results, about), "evaluation": about}
    for name in splits:
        rows = predictions[predictions["split"] == name].dropna(subset=["label"])
        rows = scoring.held_out(rows) if name == "val" else rows
        results[name] = {**scoring.score_split(rows), "clusters": scoring.score_clusters(rows, index)}
        say(scoring.in_words(name if native else f"{name}, {profile}", results[name]))
    if beside is not None:
        results["baseline"] = beside
    out = folder.profile(profile)
    write_text(out / "predictions.csv", predictions.to_csv(index=False))
    written = write_summary(out, results)
    page = write_report(
        run, profile, predictions, lambda split, row: datasets[split].photo(row),
        lambda split, row: evidence_map(model, datasets[split][row]) if native else None,
    )  # fmt: skip
    say(f"report: {page}")
    return written


if __name__ == "__main__":
    raise SystemExit(command(evaluate, "evaluate"))
