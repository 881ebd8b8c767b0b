"""Prediction: how long one photo takes, and how many per second in batches and from files."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.parts import Bench
from data_prep.scenes.data_set import scenes
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.devices import spare_cores
from pipeline.evaluation.prediction import answers, find_photos, score
from pipeline.model.roadwork import RoadworkModel

BATCH = 16


def prediction(bench: Bench) -> None:
    """Measure the model in memory and from files."""
    photos = bench.place / "predicted-photos"
    scenes(photos, bench.sizes.photos, bench.sizes.photo_size, workers=1 if bench.dry else 0)
    files = find_photos([str(photos / "images")])
    model = RoadworkModel.build(bench.model_config(), None, device=bench.device).eval()
    spec, data = model.config.input_spec, files[0].read_bytes()
    one = collate([prepare(data, spec)])
    many = collate([prepare(file.read_bytes(), spec) for file in files[:4]] * (BATCH // 4))

    def latency(precision: torch.dtype) -> dict[str, Any]:
        model.to(precision)
        return {"ms": 1e3 * bench.seconds(partial(score, model, one))}

    def batch() -> dict[str, Any]:
        work = partial(score, model, many)
        return {"photos_per_s": BATCH / bench.seconds(work), "peak_gb": bench.peak_gb(work)}

    def from_files(workers: int) -> dict[str, Any]:
        start = time.perf_counter()
        done = sum(1 for _ in answers(model, files, BATCH, workers))
        return {"photos_per_s": done / (time.perf_counter() - start)}

    bench.attempt("decoding and cutting one photo", lambda: {"ms": 1e3 * bench.seconds(partial(prepare, data, spec))})
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        bench.attempt(f"one photo in memory, head in {name}", latency, precision)
    bench.attempt(f"{BATCH} photos in memory", batch)
    for workers in sorted({2, spare_cores(bench.device)}):
        bench.attempt(f"from files, {workers} workers", from_files, workers)
