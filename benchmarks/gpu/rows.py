"""The numbers of `benchmarks/gpu.sh` as tables of docs/results.md, measured or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.model.config import HEADS, PRUNING

NOT_MEASURED = "not measured yet"
LABELS = {
    "loss": "loss", "logits_fp32": "logits fp32", "logits_bf16": "logits bf16", "evidence_fp32": "evidence fp32",
    "median": "median", "most": "most", "named": "operations", "matmul_tflops": "TFLOP/s, 8192 square",
    "copy_tb_per_s": "TB/s of a copy", "ms": "ms", "tflops": "TFLOP/s", "error": "error", "kernel": "kernel",
    "views_per_s": "views/s", "photos_per_s": "photos/s", "images_per_s": "photos/s", "mfu": "MFU",
    "peak_gb": "peak GB", "compile_s": "s to compile", "decode_ms": "ms to decode", "workers": "workers",
    "cosine_distance_of_cls": "1 - cosine of CLS", "cosine_distance_of_patches": "1 - cosine of patches",
    "cosine_of_cls": "mean cosine of CLS", "cosine_of_cells": "mean cosine of cells", "difference": "difference",
    "wall_s": "s in all", "processes": "processes", "equal": "same bits", "step_s": "s per step",
    "data_wait_share": "share of waiting for data", "gpu_peak_gib": "peak GiB", "peak_gib": "peak GiB",
    "estimate_gib": "doctor's GiB", "save_s": "s that training stops", "write_s": "s in the background",
}  # fmt: skip
PASS = ("ms", "views_per_s", "photos_per_s", "tflops", "mfu")
ON_VIEWS = (*PASS, "peak_gb")
NEARNESS = ("cosine_distance_of_cls", "cosine_distance_of_patches")
RUN = ("images_per_s", "step_s", "mfu", "gpu_peak_gib", "data_wait_share")
PREDICT = ("processes", "images_per_s", "wall_s")
PATHS = [f"head {head}, {where}" for head in HEADS for where in ("online", "cached")] + [
    *(f"pruning {mode}" for mode in PRUNING), "mixup", "without cell evidence", "2 heads", "3 heads",
]  # fmt: skip
BESIDE = ("logits_fp32", "logits_bf16", "evidence_fp32")
# Call, part, line and the keys of its numbers that the tables show.
ROWS: dict[int, dict[str, dict[str, tuple[str, ...]]]] = {
    1: {
        "smoke": {
            **dict.fromkeys(PATHS, ("loss",)),
            "beside the CPU": BESIDE,
            "3 heads beside the CPU": BESIDE,
            "second derivatives beside the CPU": ("median", "most"),
            "not deterministic, by torch's own list": ("named",),
        },
        "extraction": {
            "ceilings": ("matmul_tflops", "copy_tb_per_s"),
            **{f"attention {name}": ("ms", "tflops", "error", "kernel")
               for name in ("auto", "cudnn", "flash", "efficient", "math")},
            **{f"eager, {part}": ON_VIEWS for part in ("a quarter pass", "half a pass", "a pass")},
            "eager, from pinned memory to tokens": PASS,
            "compiling layer by layer": ("compile_s",),
            "compiled by layer, a pass": ON_VIEWS,
            "compiled by layer, from pinned memory to tokens": PASS,
            "compiled by layer, from photos to tokens": (*PASS, "decode_ms", "workers"),
            "FP8 in the MLPs, compiled by layer, a pass": (*ON_VIEWS, "compile_s", *NEARNESS),
            "FP8 in all products, compiled by layer, a pass": (*ON_VIEWS, "compile_s", *NEARNESS),
            "FP8 in all products, from pinned memory to tokens": (*PASS, "cosine_of_cls", "cosine_of_cells"),
        },
        "prediction": {
            "decoding and cutting one photo": ("ms",),
            "one photo in memory, head in bf16": ("ms", "peak_gb"),
            "one photo in memory, head in fp32": ("ms", "peak_gb"),
            "16 photos in memory": ("photos_per_s", "peak_gb"),
            "from files, two workers": ("photos_per_s",),
            "from files, a worker on each spare core": ("photos_per_s", "workers"),
            "`predict`": (*PREDICT, "peak_gb"),
            "`predict`, a process on each GPU": ("equal", *PREDICT),
        },
        "experts": {
            "experts in turn": ("ms", "peak_gb"),
            "experts in one grouped product": ("ms", "peak_gb", "difference"),
        },
    },
    2: {
        "training": {
            "features, by the command": ("images_per_s", "wall_s"),
            "AdamW, ZeRO-2": RUN,
            "AdamW, ZeRO-2, the same again": ("equal",),
            "AdamW, ZeRO-2, resumed halfway": ("equal",),
            "memory beside its estimate": ("peak_gib", "estimate_gib"),
            "saves in the background": ("save_s", "write_s"),
            "features in the GPU's memory": RUN,
            "from photos, with a validation": RUN,
            "memory from photos beside its estimate": ("peak_gib", "estimate_gib"),
            **dict.fromkeys(("AdamW, ZeRO-1", "AdamW, ZeRO-3", "sophia_g", "sophia_h", "train.deterministic"), RUN),
            "train.deterministic, the same again": ("equal",),
            "train.deterministic, resumed halfway": ("equal",),
            "experts in one grouped product": RUN,
            **dict.fromkeys(("baseline", "3 heads", "features in the host's memory"), RUN),
            "`evaluate`, a process on each GPU": ("processes", "wall_s"),
            "a process on each GPU": RUN,
            "a process on each GPU, experts over two": RUN,
        },
        "whole": {
            "compiling all layers at once": ("compile_s",),
            "compiled as a whole, a pass": ON_VIEWS,
            "compiled as a whole, from pinned memory to tokens": PASS,
            "first pass of another memory layout": ("compile_s",),
        },
    },
}  # fmt: skip


def table(call: int, results: Path) -> str:
    """The Markdown table of a call: a line for each number, and a column for each GPU that was measured.

    Args:
        call: 1 or 2.
        results: Folder of the committed `HARDWARE-gpu-CALL.jsonl`.
    """
    files = sorted(results.glob(f"*-gpu-{call}.jsonl"))
    measured = {file.name.removesuffix(f"-gpu-{call}.jsonl"): read(file) for file in files}
    columns = [f"`{name}`" for name in measured] or ["found"]
    lines = [["part", "what", "numbers", *columns], ["---"] * (3 + len(columns))]
    for part, rows in ROWS[call].items():
        for what, keys in rows.items():
            found = [cell(numbers.get((part, what)), keys) for numbers in measured.values()] or [NOT_MEASURED]
            lines.append([part, what, ", ".join(LABELS[key] for key in keys), *found])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """A file's lines by part and what; the first one, about the machine, is left out.

    Raises:
        ValueError: The file is of a rehearsal.
    """
    about, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    if about["dry"]:
        raise ValueError(f"{file} is of a rehearsal, which says nothing about a GPU")
    return {(line["part"], line["what"]): line for line in lines}


def cell(line: dict[str, Any] | None, keys: tuple[str, ...]) -> str:
    """The numbers of a line, in the order of their keys; or that there are none, or why."""
    if line is None:
        return NOT_MEASURED
    if "failed" in line:
        return f"failed: {line['failed'].partition(chr(10))[0][:80]}".replace("|", "/")
    return ", ".join(_shown(line.get(key)) for key in keys)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
