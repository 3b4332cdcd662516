"""A worker never outlives its owner, the process whose pipeline it serves, and never dies of one that lives.

In the worker: the kernel is asked to kill it when its parent dies, and a thread watches the
control socket and the owner's process. Either alone has a gap. The thread needs the GIL, which
an extension that hangs may hold; the kernel does not know of a socket that was closed. The parent
is the owner, or else the server that forked the worker, which is killed with its own parent, the owner.

In the parent: the kernel binds its promise to the thread that forked the worker, so workers
started from a thread that ends sooner than their pipeline would be killed with it. One daemon
thread, which lives as long as the process, starts all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1

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


def die_with(parent: int) -> int:
    """Have the kernel kill this process when its parent ends.

    Returns:
        A descriptor that becomes readable at the parent's end; -1 where the kernel has none.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    ends = -1
    with contextlib.suppress(OSError):
        ends = os.pidfd_open(parent)
    if os.getppid() != parent:
        os._exit(0)
    return ends


def watch(control: socket.socket, owner: int) -> None:
    """In a thread of a worker: leave at once when told to, or when the owner is gone.

    The owner's process is watched (by its pidfd, or -1) as well as its socket: a child it forked
    may hold a copy of the socket open.
    """
    poller = select.poll()
    poller.register(control, select.POLLIN)
    if owner >= 0:
        poller.register(owner, select.POLLIN)
    poller.poll()
    os._exit(0)
