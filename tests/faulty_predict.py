"""`python -m pipeline.predict` with a fault on one rank at one of its batches: FAULT="KIND RANK BATCH".

KIND is `kill`, `raise`, `memory` or `wait`, which makes the file that MARKER names and then takes a minute; batches are
counted from 0.
"""

import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from pipeline.cli import command
from pipeline.evaluation import prediction
from pipeline.predict import predict

kind, rank, due = os.environ["FAULT"].split()
score, batches = prediction.score, count()


def faulty(model, views):
    if os.environ.get("RANK", "0") == rank and next(batches) == int(due):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "raise":
            raise ZeroDivisionError("a bug")
        elif kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        Path(os.environ["MARKER"]).touch()
        time.sleep(60)
    return score(model, views)


prediction.score = faulty
raise SystemExit(command(predict, "predict"))
