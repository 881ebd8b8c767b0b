"""How a process that reads for a loader begins."""

from __future__ import annotations

import os
import signal
import threading

from pipeline.data.allocator import keep_freed_memory

REQUESTS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def begin_worker(number: int) -> None:
    """Prepare a worker process of a `DataLoader`, as its `worker_init_fn`.

    It keeps the memory of one batch for the next, and leaves requests to stop to the process that it reads for: they
    are often sent to a whole process group, by terminals, batch systems and torch's launcher. A worker that ended then
    would take the last batches with it, before the other process has saved.

    Args:
        number: The worker's number, unused.
    """
    keep_freed_memory()
    for request in REQUESTS:
        signal.signal(request, signal.SIG_IGN)
    # The loader itself ends a worker with SIGTERM, so it is the sender that counts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
