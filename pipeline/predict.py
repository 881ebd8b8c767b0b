"""Predict roadwork on photos: `python -m pipeline.predict --model RUN/model --input PHOTOS --output CSV`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from pipeline.cli import command
from pipeline.errors import require, typed


def predict(
    model: Path,
    input: list[str],
    output: Path,
    *,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
) -> Path:
    """Predict roadwork on photographs, without metadata. A broken photograph is a row with an error.

    The probabilities are calibrated if the model was exported after an evaluation; 0.5 is then the best cut.

    Args:
        model: Folder of a trained or exported model.
        input: Files, folders (which are searched for images) and glob patterns.
        output: A .csv or .jsonl file: path, probability, label, kept_views, error; one row per photo.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views; 0 does it in this one.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.

    Returns:
        The path of a summary beside the output.
    """
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers >= 0, "--workers", workers, "0 or more")
    from pipeline.devices import pick_device
    from pipeline.evaluation.inference import is_calibrated, load_model
    from pipeline.evaluation.prediction import WRITERS, answers, find_photos
    from pipeline.files import whole_file, write_json
    from pipeline.progress import say, track

    require(output.suffix in WRITERS, "--output", str(output), f"a file that ends in {' or '.join(WRITERS)}")
    start, files = time.monotonic(), find_photos(input)
    classifier = load_model(model, pick_device(device))
    calibrated = is_calibrated(classifier)
    if not calibrated:
        say(
            f"{model} holds no calibration: its probabilities are not calibrated, and 0.5 may not be the best cut; run "
            f"`{typed('evaluate')}` and `{typed('export')}` on its run"
        )
    counts: Counter[str] = Counter()
    with whole_file(output, "w", encoding="utf-8", newline="") as stream:
        write = WRITERS[output.suffix](stream)
        for row in track(answers(classifier, files, batch_size, workers), len(files), "predicting"):
            write(row)
            counts["failed" if row["error"] else row["label"]] += 1
    failed = counts.pop("failed", 0)
    if failed:
        say(f"{failed} of {len(files)} photos have no answer; the column `error` says why")
    wall_s = time.monotonic() - start
    # Several outputs may share a folder, such as /tmp, so the summary has the output's name.
    summary = output.with_suffix(".summary.json").resolve()
    values = {
        "output": str(output.resolve()),
        "model": str(model.resolve()),
        "photos": len(files),
        "failed": failed,
        "calibrated": calibrated,
        "labels": dict(counts),
        "wall_s": round(wall_s, 2),
        "images_per_s": round(len(files) / wall_s, 2),
    }
    write_json(summary, values)
    return summary


if __name__ == "__main__":
    raise SystemExit(command(predict, "predict"))
