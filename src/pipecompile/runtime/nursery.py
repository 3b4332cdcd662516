"""Worker processes are born in one thread that lives as long as this process.

A worker asks the kernel to be killed when its parent dies (``worker.py``). The kernel binds that
to the thread that forked it: started from a thread that ends sooner than the pipeline, workers
would be killed with it. So one daemon thread starts all of them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
_lock = threading.Lock()
_alive = False


def born_here(start: Callable[[], T]) -> T:
    """Call ``start`` in the thread that outlives all pipelines; its result, or its exception."""
    global _alive
    with _lock:
        if not _alive:
            threading.Thread(target=_serve, name="pipecompile-nursery", daemon=True).start()
            _alive = True
    job: Future[T] = Future()
    _jobs.put((job, start))
    return job.result()


def _serve() -> None:
    while True:
        job, start = _jobs.get()
        try:
            job.set_result(start())
        except BaseException as error:
            job.set_exception(error)
        del job, start


def _forked() -> None:
    """A fork has none of its parent's threads, and perhaps a lock that one of them held."""
    global _alive, _jobs, _lock
    _alive, _jobs, _lock = False, queue.SimpleQueue(), threading.Lock()


os.register_at_fork(after_in_child=_forked)
