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
from multiprocessing import forkserver
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 4  # per worker: enough that none waits for the parent


class Workers:
    """A pool of processes; one worker means this process, without a pool."""

    def __init__(self, count: int, preload: tuple[str, ...] = ()):
        """Start nothing yet.

        Args:
            count: Processes; 0 takes every core that this process may use.
            preload: Modules that are slow to import; the processes share one import, and its memory.
        """
        self.count, self.preload = count or len(os.sched_getaffinity(0)), preload
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            # Forked from a fresh server, because a fork of this process could inherit a lock that a thread of
            # the progress bar or of numpy holds, and hang.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", *self.preload])
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_end_with_parent)
            self._start()
        return self

    def _start(self) -> None:
        """Start all processes, which ignore Ctrl-C: a terminal sends it to every process, and this one ends the others.

        A Ctrl-C takes effect only once they have started; else they would find this process gone, and print an error.
        """
        assert self._pool is not None
        came: list[int] = []
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits this, and so do its forks
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
        for _ in range(self.count):
            self._pool.submit(os.getpid)
        signal.signal(signal.SIGINT, usual)
        if came:
            self._pool.shutdown(cancel_futures=True)
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with `function(item)`, in order. Both must be picklable, `function` by its name."""
        if self._pool is None:
            for item in items:
                yield item, function(item)
            return
        running: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            running.append((item, self._pool.submit(function, item)))
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
