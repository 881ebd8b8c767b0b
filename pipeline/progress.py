"""Progress of long work: a bar on a terminal, a plain line every ten seconds elsewhere, always on stderr."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PLAIN_INTERVAL_S = 10.0


def say(text: str) -> None:
    """Print one line for the user on stderr; stdout carries only a command's summary path."""
    print(text, file=sys.stderr, flush=True)


def silence_libraries() -> None:
    """Keep the progress bars and notes of imported libraries out of the log."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def format_seconds(seconds: float) -> str:
    """Seconds as minutes and seconds: `75.2` becomes `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def track(
    items: Iterable[T],
    total: int | None,
    what: str,
    unit: str = "images",
    amount: Callable[[T], int] = lambda item: 1,
    note: Callable[[], str] = lambda: "",
) -> Iterator[T]:
    """Pass `items` through and show the progress.

    Args:
        items: The items of the work.
        total: Sum of their amounts; None if it is not known before the end.
        what: Name of the work.
        unit: Unit of the amounts.
        amount: The share of `total` that one item stands for.
        note: Gives a note to show at any moment; empty for none.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    start, shown_s, done = time.monotonic(), 0.0, 0
    bar = Progress(*columns, console=Console(stderr=True)) if sys.stderr.isatty() else None
    with bar or nullcontext():
        task = bar.add_task(what, total=total, rate="") if bar else None
        for item in items:
            yield item
            done += amount(item)
            spent_s = max(time.monotonic() - start, 1e-9)
            rate = done / spent_s
            if bar and task is not None:
                bar.update(task, completed=done, rate=_and(f"{rate:.1f} {unit}/s", note()))
            elif spent_s - shown_s >= PLAIN_INTERVAL_S and done:
                left = "" if total is None else f", {format_seconds((total - done) / rate)} left"
                of = "" if total is None else f"/{total}"
                say(_and(f"{what}: {done}{of}, {rate:.1f} {unit}/s{left}", note()))
                shown_s = spent_s
    if not bar:
        spent_s = time.monotonic() - start
        say(_and(f"{what}: {done} {unit} in {format_seconds(spent_s)} ({done / max(spent_s, 1e-9):.1f}/s)", note()))


def _and(text: str, note: str) -> str:
    return f"{text}, {note}" if note else text
