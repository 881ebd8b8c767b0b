"""Errors as one sentence each, and the exit statuses that tell a user's mistake from a stop or a failure."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_AUDIT = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, running again resumes

RANK_ZERO_FIRST_S = 3.0
LOST_PEER_FIRST_S = 2.0

MOST_SHOWN = 200  # characters of a value in a message

LAUNCH_SH = Path(__file__).resolve().parents[1] / "launch.sh"

# A worker's own exit status does not survive `accelerate launch`, so it is written to this file too.
STATE_FILE_VARIABLE = "ROADWORK_STATE_FILE"
# When the launcher started, in seconds since 1970: a run that it restarts has the rest of the time.
STARTED_VARIABLE = "ROADWORK_STARTED"


# Errors that the user must fix: a disk that is full or read-only, permissions, a file where a folder should be.
FIXABLE_ERRNOS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
        errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    }
)  # fmt: skip

# Messages of gloo and NCCL after another process of the run has ended, whose own error is the one that matters.
LOST_PEER = re.compile(r"[Cc]onnection (closed|reset) by peer|[Bb]roken pipe|remote process exited|socketTest")


# Messages of torch's loaders where /dev/shm, through which their workers hand batches over, is full.
NO_SHARED_MEMORY = re.compile(r"Bus error|out of shared memory|</?torch_\d+|unable to mmap \d+ bytes")
SHARED_MEMORY = (
    "/dev/shm, through which workers hand batches over, is full or too small; start the container with --shm-size=8g "
    "or --ipc=host, or read in fewer workers (--workers 0, in training --data.workers 0, needs no shared memory)"
)


def in_checkout() -> bool:
    """Whether this is a checkout of the project, which has launch.sh, and not an installed wheel."""
    return LAUNCH_SH.is_file()


def typed(words: str) -> str:
    """A command as the user types it: `./launch.sh WORDS` in a checkout, `roadwork WORDS` from an installed wheel."""
    return f"{'./launch.sh' if in_checkout() else 'roadwork'} {words}"


class UserError(ValueError):
    """A mistake in the user's input; the message says what, where, and what to do, in one sentence."""

    def __init__(self, message: str):
        if message.startswith("Caught UserError in "):
            # A DataLoader raises a worker's error again, with the worker's whole traceback as its message.
            message = message.rpartition(f"{__name__}.UserError: ")[2].strip()
        super().__init__(" ".join(message.splitlines()))  # names of files and values may hold any character


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Refuse a configuration value; the message has the key, the value and what is allowed."""
    if not condition:
        raise UserError(f"{key} is {shown(value)}, but must be {allowed}")


def shown(value: object) -> str:
    """A value as a message shows it; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


# A test of a value, and what is allowed, in words.
Rule = tuple[Callable[[Any], bool], str]


def check_fields(room: str, config: object, **rules: Rule) -> None:
    """Refuse a configuration with a field that breaks its rule; see `require` for the message.

    Args:
        room: The part of each key before the dot.
        config: The dataclass with the fields.
        **rules: Rules by field, from the functions below.
    """
    for name, (is_allowed, allowed) in rules.items():
        require(is_allowed(getattr(config, name)), f"{room}.{name}", getattr(config, name), allowed)


def one_of(choices: Sequence[str]) -> Rule:
    """A rule that allows a few words."""
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def at_least(low: float, most: float = 1e9) -> Rule:
    """A rule that allows numbers from `low` on; what is beyond `most` is a slip of the hand, or an attack."""
    return lambda value: low <= value <= most, f"{low:g} or more, and at most {most:.10g}"


def above(low: float) -> Rule:
    """A rule that allows finite numbers above `low`."""
    return lambda value: low < value < math.inf, f"above {low:g}"


def in_range(text: str) -> Rule:
    """A rule that allows an interval, written as in mathematics: `(0, 1]` is above 0 and at most 1."""
    low, high = (float(end) for end in text[1:-1].split(","))
    inside_low = operator.le if text[0] == "[" else operator.lt
    inside_high = operator.le if text[-1] == "]" else operator.lt
    return lambda value: inside_low(low, value) and inside_high(value, high), f"in {text}"


class Stopped(Exception):
    """The work stopped on request and can be resumed by the same command; the message says how."""


class AuditFailed(Exception):
    """A check that found something; the message says what, `summary` is the path of the whole list."""

    def __init__(self, message: str, summary: Path):
        super().__init__(message)
        self.summary = summary


def run(main: Callable[[], Path | str | None]) -> int:  # noqa: PLR0912  (a branch for each way to end)
    """Run a command's main function and turn its end into an exit status.

    A `UserError` becomes one line on stderr and status 2, a failed audit status 3, a request to stop status 75. System
    errors that the user can fix, such as a full disk, have status 2 too. Anything else is a bug and keeps its
    traceback. If `main` returns a summary, its path or URL is printed as the last line of stdout.
    """
    status, message, summary = EXIT_OK, None, None
    try:
        summary = main()
    except AuditFailed as error:
        status, message, summary = EXIT_AUDIT, f"found: {error}", error.summary
    except UserError as error:
        status, message = EXIT_USER, f"error: {error}"
    except OSError as error:
        if error.errno not in FIXABLE_ERRNOS:
            raise
        status, message = EXIT_USER, f"error: {explain(error)}"
    except (Stopped, KeyboardInterrupt) as stop:
        reason = str(stop) or "interrupted; the same command resumes here"
        status, message = EXIT_STOPPED, f"stopped: {reason}"
    except FloatingPointError as error:
        status, message = EXIT_FAILED, f"failed: {error}"
    except RuntimeError as error:
        if NO_SHARED_MEMORY.search(str(error)):
            status, message = EXIT_USER, f"error: {SHARED_MEMORY}"
        elif LOST_PEER.search(str(error)):
            # Not the run's outcome: the launcher knows how the other rank ended, and may restart all of them.
            print(
                f"rank {os.environ.get('RANK', '0')} lost the connection to another rank", file=sys.stderr, flush=True
            )
            time.sleep(LOST_PEER_FIRST_S)  # the rank that failed first is to be the first whose end the launcher sees
            return EXIT_FAILED
        else:
            raise
    if os.environ.get("RANK", "0") != "0" and status == EXIT_OK:
        return status
    first = _write_state(status, message)
    if os.environ.get("RANK", "0") != "0":
        # When the first rank ends, the others are killed. Rank 0 usually has the same message, and may have work to
        # end; a rank that still lives after this wait failed alone.
        time.sleep(RANK_ZERO_FIRST_S)
    if message is not None and first:
        print(message, file=sys.stderr, flush=True)
    if summary is not None:
        print(summary, flush=True)
    return status


def _lost_peer() -> int:
    # Not the run's outcome: the launcher knows how the other rank ended, and may restart all of them.
    print(f"rank {os.environ.get('RANK', '0')} lost the connection to another rank", file=sys.stderr, flush=True)
    time.sleep(LOST_PEER_FIRST_S)  # the rank that failed first is to be the first whose end the launcher sees
    return EXIT_FAILED


def explain(error: OSError) -> str:
    """A system error as one sentence: what was refused, and where."""
    reason = (error.strerror or str(error)).lower()
    if error.filename is None:
        return f"{reason}; what is done so far is kept, so fix that and give the same command again"
    return f"{os.fsdecode(error.filename)}: {reason}; fix that and give the same command again"


def _write_state(status: int, message: str | None) -> bool:
    """Leave the status to the launcher, unless another rank did: that one ended first, and the others because of it."""
    path = os.environ.get(STATE_FILE_VARIABLE)
    if not path:
        return True
    with contextlib.suppress(FileExistsError), Path(path).open("x") as state:
        state.write(json.dumps({"exit_status": status, "message": message}) + "\n")
        return True
    return False
