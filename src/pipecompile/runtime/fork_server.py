"""The process that workers are forked from: ``python -P -m pipecompile.runtime.fork_server``.

Importing torch takes two seconds, and a fork of a process that has done it some milliseconds. This
process imports torch and the code of the workers, and from then on only forks, reaps and reports.

Forking is safe because nothing else goes on here: there is one thread (looked at before each
fork), so no lock can be held by another, and no operator has run, so no thread pool of OpenMP, MKL
or autograd exists that a fork would lack. What such a library reads when it is loaded, it has read
from the environment this process was started with; :mod:`pipecompile.runtime.nursery` asks here
only for workers that would have been started with the same.

It ends when the process it serves ends. When only the socket is closed, it first reaps its workers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Set
from typing import Any, NoReturn

from pipecompile.runtime import control, lifeline

_WITH_OPTIMIZER = "pipecompile.runtime.step_worker"
_WORKERS = ("pipecompile.runtime.worker", _WITH_OPTIMIZER)
_IMPORTED_LATE = ("pipecompile.runtime.device", "pipecompile.runtime.step_device", "pipecompile.runtime.pickled")


def main() -> NoReturn:
    """Import what workers need, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    for name in ("requests", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    requests, owner = socket.socket(fileno=options.requests), lifeline.die_with(options.parent)
    if owner < 0:
        sys.exit("the kernel has no pidfd_open")
    for name in (*_WORKERS, *_IMPORTED_LATE):
        importlib.import_module(name)
    os.chdir("/")
    _freeze()
    ForkServer(requests, owner).serve()


class ForkServer:
    """Forks one worker a request.

    A request is the name of the worker's module and one end of a socket pair. On it this process sends the
    worker's pid and pidfd, or why there is none, and in the end the exit code as Popen counts them
    (negative for signals). The worker itself reads from it who it is to be.
    """

    def __init__(self, requests: socket.socket, owner: int) -> None:
        self._requests, self._owner, self._optimizers = requests, owner, False
        self._workers: dict[int, tuple[int, socket.socket]] = {}
        stray = {int(fd) for fd in os.listdir("/proc/self/fd")} - {0, 1, 2, requests.fileno(), owner}
        # One of them is the listing's own; that is closed by now.
        self._stray = [fd for fd in sorted(stray) if _is_open(fd)]
        packages = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self._path = [entry for entry in sys.path if entry not in packages]

    def serve(self) -> NoReturn:
        """Fork, reap and report until the owner is gone."""
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        poller.register(self._owner, select.POLLIN)
        asked = True
        while asked or self._workers:
            for fd, _ in poller.poll():
                if fd == self._owner:
                    os._exit(0)
                elif fd == self._requests.fileno():
                    name, fds, _, _ = socket.recv_fds(self._requests, 1024, 1, socket.MSG_CMSG_CLOEXEC)
                    if fds:
                        self._prepare(name.decode())
                        pidfd = self._fork(socket.socket(fileno=fds[0]))
                        if pidfd is not None:
                            poller.register(pidfd, select.POLLIN)
                    else:
                        asked = False
                        poller.unregister(fd)
                else:
                    poller.unregister(fd)
                    self._reap(fd)
        os._exit(0)

    def _prepare(self, name: str) -> None:
        """Import what only some workers need, when the first of them is asked for."""
        if name == _WITH_OPTIMIZER and not self._optimizers:
            # The first optimizer of a process imports torch's compiler, in a second; so does this.
            torch = sys.modules["torch"]
            torch.compiler.disable(lambda: None)
            self._optimizers = True
            _freeze()

    def _fork(self, channel: socket.socket) -> int | None:
        """The pidfd of a new worker, or None."""
        threads, server = len(os.listdir("/proc/self/task")), os.getpid()
        pid, refusal = -1, ""
        if threads != 1:
            refusal = f"its process has {threads} threads after importing torch"
        elif self._stray:
            refusal = f"its process holds files of its own after importing torch: {self._stray}"
        else:
            try:
                pid = os.fork()
            except OSError as error:
                refusal = str(error)
        if pid == 0:
            self._become(channel, server)
        # Whoever asked may be gone; the worker then finds its channel closed.
        with contextlib.suppress(OSError):
            control.send(channel, {"pid": pid, "refusal": refusal})
        if pid < 0:
            channel.close()
            return None
        pidfd = os.pidfd_open(pid)
        with contextlib.suppress(OSError):
            control.send_fds(channel, [pidfd])
        self._workers[pidfd] = pid, channel
        return pidfd

    def _reap(self, pidfd: int) -> None:
        pid, channel = self._workers.pop(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            control.send(channel, {"code": code})
        channel.close()
        os.close(pidfd)

    def _become(self, channel: socket.socket, server: int) -> NoReturn:
        """In the fork: turn into the worker that is asked for."""
        try:
            # The kernel ends workers with the server, and the server with its owner.
            os.close(lifeline.die_with(server))
            os.setsid()
            self._requests.close()
            for pidfd, (_, other) in self._workers.items():
                os.close(pidfd)
                other.close()
            request = control.receive(channel)
            if request is not None:
                self._work(channel, request)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _work(self, channel: socket.socket, request: dict[str, Any]) -> None:
        wanted = request["fds"]
        here, out, err, *given = control.receive_fds(channel, 3 + len(wanted))
        channel.close()
        os.fchdir(here)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for fd in (here, out, err):
            os.close(fd)
        owner, *given = [_clear_of(fd, frozenset(wanted)) for fd in (self._owner, *given)]
        for fd, number in zip(given, wanted, strict=True):
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
        os.environ.clear()
        os.environ.update(request["environment"])
        time.tzset()
        path = [*os.environ["PYTHONPATH"].split(os.pathsep), *self._path]
        sys.path[:] = dict.fromkeys(map(os.path.abspath, path))
        sys.path_importer_cache.clear()
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, request["cores"])
        _reseed()
        importlib.import_module(request["main"]).main(request["arguments"], owner)


def _clear_of(fd: int, numbers: Set[int]) -> int:
    """The same open file under a number that is not among ``numbers``."""
    passed: list[int] = []
    while fd in numbers:
        passed.append(fd)
        fd = os.dup(fd)
    for taken in passed:
        os.close(taken)
    return fd


def _freeze() -> None:
    """What lies here is never garbage: collections in the workers pass it over, and so leave it shared."""
    gc.collect()
    gc.freeze()


def _reseed() -> None:
    """Each worker draws random numbers of its own, as if it had been started alone. Python sees to its own."""
    sys.modules["torch"].default_generator.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
