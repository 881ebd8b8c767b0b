"""Prediction: how long one photo takes, and how many per second in batches and from files."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.commands import answer
from benchmarks.gpu.parts import Bench
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.devices import spare_cores
from pipeline.evaluation.prediction import PhotoFiles, answers, score
from pipeline.model.roadwork import RoadworkModel
from pipeline.predict import predict

BATCH = 16
MODEL, ONE = "predicting-model", "answers.csv"


def prediction(bench: Bench) -> None:
    """Measure the model in memory and from files, then the command."""
    model = RoadworkModel.build(bench.model_config(), None, device=bench.device).eval()
    spec, files = model.config.input_spec, sorted((bench.photos / "images").iterdir())
    data = files[0].read_bytes()
    one = collate([prepare(data, spec)])
    many = collate([prepare(file.read_bytes(), spec) for file in files[:4]] * (BATCH // 4))

    def latency(precision: torch.dtype) -> dict[str, Any]:
        model.to(precision)
        work = partial(score, model, one)
        return {"ms": 1e3 * bench.seconds(work), "peak_gb": bench.peak_gb(work)}

    def batch() -> dict[str, Any]:
        work = partial(score, model, many)
        return {"photos_per_s": BATCH / bench.seconds(work), "peak_gb": bench.peak_gb(work)}

    def from_files(workers: int) -> dict[str, Any]:
        start = time.perf_counter()
        done = sum(map(len, answers(model, PhotoFiles(files, spec), BATCH, workers)))
        return {"workers": workers, "photos_per_s": done / (time.perf_counter() - start)}

    bench.attempt("decoding and cutting one photo", lambda: {"ms": 1e3 * bench.seconds(partial(prepare, data, spec))})
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        bench.attempt(f"one photo in memory, head in {name}", latency, precision)
    bench.attempt(f"{BATCH} photos in memory", batch)
    for name, workers in (("two workers", 2), ("a worker on each spare core", spare_cores(bench.device))):
        bench.attempt(f"from files, {name}", from_files, workers)
    bench.attempt("`predict`", by_command, bench, model)
    if bench.several > 1:
        bench.attempt("`predict`, a process on each GPU", by_all, bench)


def by_command(bench: Bench, model: RoadworkModel) -> dict[str, Any]:
    """Predict on a folder of photos with a saved model, as `./launch.sh predict` does; loading is in `wall_s`."""
    model.save_pretrained(bench.place / MODEL)
    output, photos = bench.place / ONE, [str(bench.photos / "images")]
    peak_gb = bench.peak_gb(partial(predict, bench.place / MODEL, output, input=photos, device=str(bench.device)))
    return {**summary(output), "peak_gb": peak_gb}


def by_all(bench: Bench) -> dict[str, Any]:
    """The same in one process for each GPU; the rows should be the same."""
    output = bench.place / "answers-of-all.csv"
    words = ("--model", bench.place / MODEL, "--output", output, "--input", bench.photos / "images")
    answer(bench, "predict", "predict", *map(str, words))
    equal = output.read_bytes() == (bench.place / ONE).read_bytes()
    return {"equal": equal, **summary(output)}


def summary(output: Path) -> dict[str, Any]:
    """What the summary beside a prediction says of its speed."""
    found = json.loads(output.with_suffix(".summary.json").read_text())
    answered = found["photos"] - found["failed"]
    return {"answered": answered, **{key: found[key] for key in ("processes", "images_per_s", "wall_s")}}
