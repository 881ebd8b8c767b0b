"""Work spread over processes: results in the order of the items, and only a few items in memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import forkserver
from types import TracebackType
from typing import Any, TypeVar

from pipeline.progress import say

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 4  # per worker: enough that none waits for the parent
FEW_PHOTOS = 16  # this process looks at them before a pool would have started
LATE_S = 10.0  # no work has been shown until then
_END: Any = object()


class Workers:
    """A pool of processes; one worker means this process, without a pool."""

    def __init__(self, count: int, preload: tuple[str, ...] = ()):
        """Start nothing yet.

        Args:
            count: Processes; 0 takes every core that this process may use.
            preload: All modules that the work imports. The processes share one import, and its memory; what is
                missing here, each of them imports by itself, all at the same time.
        """
        self.count, self.preload = count or len(os.sched_getaffinity(0)), preload
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def _open(self) -> ProcessPoolExecutor:
        """The pool, which is started when it is needed for the first time."""
        if self._pool is None:
            # Forked from a fresh server, because a fork of this process could inherit a lock that a thread of
            # the progress bar or of numpy holds, and hang.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", *self.preload])
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_end_with_parent)
            # The server imports before it forks: seconds, or minutes where the disk or the cores are busy.
            late = threading.Timer(LATE_S, say, [f"starting {self.count} processes; they import their libraries first"])
            late.daemon = True
            late.start()
            try:
                self._start(self._pool)
            finally:
                late.cancel()
        return self._pool

    def _start(self, pool: ProcessPoolExecutor) -> None:
        """Start all processes, which ignore Ctrl-C: a terminal sends it to every process, and this one ends the others.

        A Ctrl-C takes effect only once they have started; else they would find this process gone, and print an error.
        """
        came: list[int] = []
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits this, and so do its forks
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
        for _ in range(self.count):
            pool.submit(os.getpid)
        signal.signal(signal.SIGINT, usual)
        if came:
            pool.shutdown(cancel_futures=True)
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], alone_up_to: int = 0
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each item with `function(item)`, in order.

        Args:
            function: Must be picklable by its name.
            items: Must be picklable.
            alone_up_to: If there are no more items than this, this process does the work: a pool takes seconds to
                start, in which one process does small work. That many items are taken at once.
        """
        items = iter(items)
        few = list(islice(items, alone_up_to))
        following = next(items, _END) if self.count > 1 else _END
        if following is _END:
            for item in chain(few, items):
                yield item, function(item)
            return
        pool = self._open()
        running: deque[tuple[Item, Future[Result]]] = deque()
        for item in chain(few, (following,), items):
            running.append((item, pool.submit(function, item)))
            if len(running) >= ITEMS_AHEAD * self.count:
                first, future = running.popleft()
                yield first, future.result()
        for item, future in running:
            yield item, future.result()


def _end_with_parent() -> None:
    """Let this process end when its parent is killed, instead of waiting for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
