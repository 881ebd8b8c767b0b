"""One log file per rank: the mixed output of many processes is unreadable."""

from __future__ import annotations

import os
from pathlib import Path

LOG_FOLDER_VARIABLE = "ROADWORK_LOG_FOLDER"


def divert_output() -> None:
    """Let every rank but 0 append its output to `rank-00001.log` and so on, where the launcher names a folder.

    File descriptors are redirected, so that output of C libraries and of a crashing interpreter is there too.
    """
    folder, rank = os.environ.get(LOG_FOLDER_VARIABLE), int(os.environ.get("RANK", "0"))
    if folder and rank:
        log = os.open(Path(folder) / f"rank-{rank:05d}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
