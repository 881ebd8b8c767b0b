"""What goes wrong, in one sentence, and the exit status that says whose turn it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_AUDIT = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, running again resumes

# A worker's own exit status does not survive `accelerate launch`, so it is written to this file too.
STATE_FILE_VARIABLE = "ROADWORK_STATE_FILE"


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and what to do, in one sentence."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Refuse a configuration value with the key, the value and what is allowed."""
    if not condition:
        raise UserError(f"{key} is {value!r}, but must be {allowed}")


class Stopped(Exception):
    """The work stopped on request and can be resumed by the same command; the message says how."""


def run(main: Callable[[], Path | None]) -> int:
    """Run a command's main function and turn its end into an exit status.

    A `UserError` becomes one line on stderr and status 2, a stop request status 75. Anything else is a bug and keeps
    its traceback. When `main` returns the path of its summary, the path is printed as the last line of stdout.
    """
    rank_zero = os.environ.get("RANK", "0") == "0"
    status, message = EXIT_OK, None
    try:
        summary = main()
        if summary is not None and rank_zero:
            print(summary, flush=True)
    except UserError as error:
        status, message = EXIT_USER, f"error: {error}"
    except (Stopped, KeyboardInterrupt) as stop:
        status, message = EXIT_STOPPED, f"stopped: {stop or 'interrupted; the same command goes on from here'}"
    if message is not None and rank_zero:
        print(message, file=sys.stderr, flush=True)
    _write_state(status, message, rank_zero)
    return status


def _write_state(status: int, message: str | None, rank_zero: bool) -> None:
    path = os.environ.get(STATE_FILE_VARIABLE)
    if path and rank_zero:
        Path(path).write_text(json.dumps({"exit_status": status, "message": message}) + "\n")
