"""Prediction: how long one photo takes, and how many per second in batches and from files."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.parts import Bench
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.devices import spare_cores
from pipeline.evaluation.prediction import PhotoFiles, answers, score
from pipeline.model.roadwork import RoadworkModel
from pipeline.predict import predict

BATCH = 16


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
    bench.attempt("the command `predict`", by_command, bench, model)


def by_command(bench: Bench, model: RoadworkModel) -> dict[str, Any]:
    """Predict on a folder of photos with a saved model, as `./launch.sh predict` does; loading is in `wall_s`."""
    folder = bench.place / "predicting-model"
    model.save_pretrained(folder)
    output, photos = bench.place / "answers.csv", [str(bench.photos / "images")]
    found: dict[str, Any] = {}

    def work() -> None:
        found.update(json.loads(predict(folder, output, input=photos, device=str(bench.device)).read_text()))

    peak_gb = bench.peak_gb(work)
    return {**{key: found[key] for key in ("photos", "failed", "images_per_s", "wall_s")}, "peak_gb": peak_gb}
