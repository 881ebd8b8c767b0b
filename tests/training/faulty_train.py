"""`pipeline/train.py` with a fault on one rank at one step: FAULT="KIND RANK FIRST LAST MARKER".

KIND is `kill`, `hang`, `exit` or `nan`; the steps are those from FIRST to LAST, counted from 0. Where a MARKER is
given, the fault comes only while there is no such file, and makes it: a second attempt goes well.
"""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

from pipeline import train
from pipeline.errors import run
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
        else:
            batches[0]["boxes"][0] = float("nan")
    return take_step(self, batches, counts)


Trainer._take_step = faulty
raise SystemExit(run(train.main))
