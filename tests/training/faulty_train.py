"""`pipeline/train.py` with a fault on one rank at one step: FAULT="KIND RANK FIRST LAST MARKER".

KIND is `kill`, `hang`, `exit`, `raise`, `memory` or `nan`; the steps are those from FIRST to LAST, counted from 0.
Where a MARKER is given, the fault comes only while there is no such file, and makes it: a second attempt goes well.
"""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

import torch
import torch.distributed as dist

from pipeline import train
from pipeline.distributed.startup import run_process
from pipeline.trainer import Trainer

kind, rank, first, last, *marker = os.environ["FAULT"].split()
take_step = Trainer._take_step


def faulty(self, batches, counts):
    due = self.rank == int(rank) and int(first) <= self.state.step <= int(last)
    if due and not (marker and Path(marker[0]).exists()):
        if marker:
            Path(marker[0]).touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(600)
        elif kind == "exit":
            os._exit(3)
        elif kind in ("raise", "memory"):
            dist.destroy_process_group = lambda: time.sleep(600)  # as NCCL's, which waits for the other ranks
            if kind == "raise":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.55 "
                "GiB is free. Including non-PyTorch memory, this process has 77.55 GiB memory in use."
            )
        else:
            batches[0]["boxes"][0] = float("nan")
    return take_step(self, batches, counts)


Trainer._take_step = faulty
run_process(train.main)
