"""Predict roadwork on photos: `python -m pipeline.predict --model RUN/model --input PHOTOS --output CSV`."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import command
from pipeline.errors import Stopped, require, typed

if TYPE_CHECKING:  # importing torch takes seconds, which --help should not wait for
    from pipeline.evaluation.kept_answers import KeptAnswers
    from pipeline.model.roadwork import RoadworkModel


def predict(
    model: Path,
    output: Path,
    *,
    input: list[str] = [],  # noqa: B006  (a list is what gives the flag several words)
    list: Path | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "auto",
    backbone: str | None = None,
) -> Path:
    """Predict roadwork on photographs, without metadata. A broken photograph is a row with an error.

    The probabilities are calibrated if the model was exported after an evaluation; 0.5 is then the best cut.

    It may be interrupted at any moment: answers are kept as they are made, and the same command goes on after them,
    with the photos that it found at the first start. Another model, backbone, batch size or input starts anew. The
    output appears when all is done. Under a launcher any number of processes share the photos, and the answers are the
    same.

    Args:
        model: Folder of a trained or exported model.
        output: A .csv or .jsonl file: path, probability, label, kept_views, error; one row per photo.
        input: Files, folders (which are searched for images) and glob patterns. Each photo is taken once, in the order
            given, and sorted within each of them.
        list: A file with the path of a photo on each line; these follow --input.
        batch_size: Photos in one forward pass.
        workers: Processes that read, decode and cut views, for each process that computes; 0 does it in this one; by
            default one for each spare core.
        device: cpu, cuda, cuda:1, or auto for a GPU where there is one.
        backbone: Where the backbone is now, if it has moved: a folder, a hub id or scenes-tiny. It must be the one of
            training.

    Returns:
        The path of a summary beside the output.
    """
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")
    require(workers is None or workers >= 0, "--workers", workers, "0 or more")
    import torch.distributed as dist
    from torch.utils.data import Subset

    from pipeline.devices import out_of_memory, spare_cores
    from pipeline.distributed.agreement import on_rank_zero
    from pipeline.distributed.processes import interrupted_by_signals, processes
    from pipeline.evaluation.inference import load_model
    from pipeline.evaluation.kept_answers import KeptAnswers
    from pipeline.evaluation.photo_list import check_inputs
    from pipeline.evaluation.prediction import PhotoFiles, answers, check_output
    from pipeline.progress import track

    check_output(output)
    check_inputs(input, list)
    start, kept = time.monotonic(), KeptAnswers(output, batch_size)
    try:
        with interrupted_by_signals(), processes(device) as chosen, ExitStack() as held:
            classifier = load_model(model, chosen, backbone)

            def begin() -> tuple[int, int]:
                held.enter_context(kept.locked())
                return kept.begin(_plan(model, classifier, batch_size, input, list), input, list, dist.get_world_size())

            photos, answered = on_rank_zero(begin)
            rank, world_size = dist.get_rank(), dist.get_world_size()
            share = kept.missing(photos, rank, world_size)
            files = Subset(PhotoFiles(kept.photos, classifier.config.input_spec), share)
            batches = answers(classifier, files, batch_size, spare_cores(chosen) if workers is None else workers)
            if rank == 0:
                what = "predicting" if world_size == 1 else f"predicting, process 1 of {world_size}"
                batches = track(batches, len(share), what, amount=len)
            with out_of_memory("--batch_size"):
                kept.keep(rank, zip(map(int, share.numbers), batches, strict=True))
            dist.barrier()
            about = {"model": str(model.resolve()), "photos": photos, "processes": world_size}
            return on_rank_zero(lambda: _finish(kept, classifier, about, answered, start))
    except KeyboardInterrupt as request:
        raise Stopped("the answers so far are kept; the same command goes on after them") from request


def _plan(
    folder: Path, model: RoadworkModel, batch_size: int, inputs: list[str], listed: Path | None
) -> dict[str, Any]:
    """What the answers depend on, by the option that decides it; names of photos, but not what is in them."""
    from pipeline.evaluation.inference import fingerprint, is_calibrated
    from pipeline.files import sha256_of
    from pipeline.progress import say

    if not is_calibrated(model):
        say(
            f"{folder} holds no calibration: its probabilities are not calibrated, and 0.5 may not be the "
            f"best cut; run `{typed('evaluate')}` and `{typed('export')}` on its run"
        )
    return {
        "version of roadwork": version("roadwork"),
        "--model": [fingerprint(model), model.config.decision_bias, model.config.decision_slope],
        "--backbone": model.backbone.fingerprint,
        "--batch_size": batch_size,
        "--input": [os.path.abspath(name) for name in inputs],
        "--list": None if listed is None else sha256_of(listed),
    }


def _finish(kept: KeptAnswers, model: RoadworkModel, about: dict[str, Any], answered: int, start: float) -> Path:
    """Write the output and its summary, and remove what was kept for it.

    Args:
        kept: All answers.
        model: The model.
        about: The first values of the summary.
        answered: Photos with an answer of an earlier attempt.
        start: Start of this attempt on the monotonic clock.
    """
    from pipeline.evaluation.inference import is_calibrated
    from pipeline.evaluation.prediction import WRITERS
    from pipeline.files import whole_file, write_json
    from pipeline.progress import say

    counts: Counter[str] = Counter()
    # Names of files may hold any bytes.
    with whole_file(kept.output, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        write = WRITERS[kept.output.suffix](stream)
        for path, row in kept.rows():
            write(path, row)
            counts["failed" if row.get("error") else row["label"]] += 1
    failed, photos = counts.pop("failed", 0), about["photos"]
    if failed:
        say(f"{failed} of {photos} photos have no answer; the column `error` says why")
    wall_s = time.monotonic() - start
    # Several outputs may share a folder, such as /tmp, so the summary has the output's name.
    summary = kept.output.with_suffix(".summary.json").resolve()
    values = {
        "output": str(kept.output.resolve()),
        **about,
        "failed": failed,
        "calibrated": is_calibrated(model),
        "labels": dict(counts),
        "resumed": answered,
        "wall_s": round(wall_s, 2),
        "images_per_s": round((photos - answered) / wall_s, 2),
    }
    write_json(summary, values)
    kept.remove()
    return summary


if __name__ == "__main__":
    raise SystemExit(command(predict, "predict"))
