"""Measurements that need a GPU, in two calls of under eight minutes each: `benchmarks/gpu.sh CALL OUT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError

# For each part the function that measures it, and its limit in seconds. What is needed most comes first.
CALLS = {
    1: {
        "benchmarks.gpu.smoke:smoke": 80,
        "benchmarks.gpu.extraction:extraction": 260,
        "benchmarks.gpu.prediction:prediction": 90,
        "benchmarks.gpu.experts:experts": 30,
    },
    2: {"benchmarks.gpu.training:training": 330, "benchmarks.gpu.extraction:whole": 130},
}


def gpu(call: Literal[1, 2], out: Path, dry: bool = False) -> Path:
    """Measure what a GPU changes, part by part; a part that fails or takes too long is reported as such.

    Args:
        call: 1 tries every path, then measures extraction and prediction; 2 measures training, and the compilation of
            the whole backbone.
        out: Folder for `HARDWARE-gpu-CALL.jsonl`, a line for each number, written when it is known.
        dry: Run all of it on the CPU with tiny sizes, to try the measurement itself; the file's name and every line in
            it say so.
    """
    if dry:
        os.environ |= CPU_ONLY  # before torch is asked
    from benchmarks.gpu.parts import PATIENCE, run_parts
    from pipeline.devices import refuse_idle_gpu, uses_gpu

    if not dry:
        refuse_idle_gpu()
        if not uses_gpu():
            raise UserError("there is no GPU here, and these benchmarks are about one; --dry rehearses them on the CPU")
    patience = PATIENCE if dry else 1
    return run_parts(f"gpu-{call}", {part: patience * limit_s for part, limit_s in CALLS[call].items()}, out, dry)
