"""`pipeline/train.py` whose rank 0 is killed in the middle of the write of a checkpoint, that of step STEP.

The write waits for the step after it, so training has gone on meanwhile.
"""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the project in the place of this folder
    sys.path[0] = str(Path(__file__).parents[2])

from pipeline import train
from pipeline.checkpoints import files
from pipeline.distributed.startup import run_process
from pipeline.trainer import Trainer

step, write, take_step = int(os.environ["STEP"]), files._write, Trainer._take_step
taken = -1


def counted(self, batches, counts):
    global taken
    found, taken = take_step(self, batches, counts), self.state.step + 1
    return found


def half_of_it(parts):
    parts = list(parts)
    yield from parts[: len(parts) // 2]
    while taken <= step:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(path, parts):
    due = path.name == files.OPTIMIZER and path.parent.name.startswith(f".{files.name_of(step)}")
    return write(path, half_of_it(parts) if due else parts)


Trainer._take_step, files._write = counted, deadly
run_process(train.main)
