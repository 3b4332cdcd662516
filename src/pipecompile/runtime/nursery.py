"""Where workers come from: forks of one process that has torch, or else processes of their own.

A worker sees what a process started now would see: the environment, the folder, ``sys.path``,
standard output and error, the processors allowed to the thread that starts it. What libraries
read only when they are loaded cannot be given to a fork, so another server is started when any of
that has changed, and a process of its own where a server could not do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from typing import Any

from pipecompile.runtime import control
from pipecompile.runtime.allocator import ENVIRONMENT
from pipecompile.runtime.lifeline import born_here
from pipecompile.runtime.process import Forked, Process

#: Servers that ended before their first fork until there are no more.
_TRIES = 2
_START_SECONDS = 60.0
_END_SECONDS = 2.0

#: Beginnings of variables that libraries below torch, the C library or Python read when they are loaded.
_READ_AT_LOAD = (
    "ATEN", "BLIS", "CUDA", "DNNL", "GLIBC", "GOMP", "GOTO", "KMP", "LANG", "LC_", "LD_", "LIBC", "MALLOC", "MKL",
    "NPY", "NUMEXPR", "NVIDIA", "OMP", "ONEDNN", "OPENBLAS", "PYTHON", "PYTORCH", "TORCH",
)  # fmt: skip

#: They bind threads to processors when OpenMP is loaded, within those allowed to the process then.
_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")

_log = logging.getLogger("pipecompile")


class _CannotFork(Exception):
    """Why a worker has to be a process of its own."""


def start(main: str, arguments: Sequence[str], fds: Sequence[int], threads: int) -> Process:
    """Start a worker: the ``main`` of a module, with command-line arguments.

    Args:
        main: a module of :mod:`pipecompile.runtime`.
        arguments: for its command line; ``--parent`` is added.
        fds: descriptors that are open in the worker under the same numbers.
        threads: of OpenMP and MKL, as their variables say.
    """
    arguments = [*arguments, "--parent", str(os.getpid())]
    environment = _environment(threads)
    try:
        return _nursery.fork(main, arguments, fds, environment)
    except _CannotFork as reason:
        _nursery.say(str(reason))
    command = [sys.executable, "-P", "-m", main, *arguments]
    return born_here(
        lambda: subprocess.Popen(
            command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
    )


def prepare() -> int | None:
    """Start the fork server now, so that the first worker need not wait for it to import torch.

    Returns:
        Its process id, or None where workers cannot be forked.
    """
    with contextlib.suppress(_CannotFork):
        return _nursery.present(_environment(1)).process.pid
    return None


def close() -> None:
    """End the fork server, whose workers must be gone. Another one is started when it is needed."""
    _nursery.close()


def _environment(threads: int) -> dict[str, str]:
    # Python passes over entries that are no strings, such as a Path; an empty one is the folder, if it still exists.
    entries: list[object] = list(sys.path)
    path = os.pathsep.join(entry or _folder() for entry in entries if isinstance(entry, str))
    count = str(threads)
    return {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONPATH": path}


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.sep


class _Server:
    """A fork server, as its owner sees it."""

    def __init__(self, environment: dict[str, str], fixed: Any) -> None:
        self.fixed, self.proved = fixed, False
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", "-m", "pipecompile.runtime.fork_server"]
            command += ["--requests", str(theirs.fileno()), "--parent", str(os.getpid())]
            self.process = born_here(
                lambda: subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )

    def fork(self, request: dict[str, Any], fds: Sequence[int]) -> Forked:
        """A new worker.

        Raises:
            _CannotFork: if the server will not, or is no more.
        """
        channel, theirs = socket.socketpair()
        channel.settimeout(_START_SECONDS)
        try:
            with theirs:
                control.send_fds(self.requests, [theirs.fileno()], request["main"].encode())
            answer = control.receive(channel)
            if answer is None:
                raise _CannotFork(f"the process to fork from ended, or said nothing for {_START_SECONDS:.0f} s")
            if answer["refusal"]:
                raise _CannotFork(answer["refusal"])
            (pidfd,) = control.receive_fds(channel, 1)
        except (OSError, EOFError) as error:
            channel.close()
            raise _CannotFork(f"the process to fork from does not answer: {error}") from error
        except BaseException:
            channel.close()
            raise
        self.proved = True
        worker = Forked(answer["pid"], pidfd, channel)
        try:
            # A worker that is gone already is for its owner to find.
            with contextlib.suppress(ConnectionError):
                control.send(channel, request)
                control.send_fds(channel, fds)
        except BaseException:
            worker.kill()
            worker.wait()
            raise
        return worker

    def dismiss(self) -> None:
        """Ask for no more workers; the server ends after its last one, and at once if it never had any."""
        self.requests.close()
        if not self.proved:
            self.process.kill()

    def end(self, seconds: float) -> None:
        """Wait for the end of a dismissed server whose workers are gone."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Nursery:
    """The fork server of this process, if any, and what became of those before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._dismissed: list[_Server] = []
        self._given_up, self._failures = "", 0
        self._said: set[str] = set()

    def say(self, reason: str) -> None:
        """Log once why workers are not forked."""
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("workers start as processes of their own, which takes 2 s: %s", reason)

    def fork(self, main: str, arguments: Sequence[str], fds: Sequence[int], environment: dict[str, str]) -> Forked:
        """A worker from the server.

        Raises:
            _CannotFork: where that does not work.
        """
        cores = sorted(os.sched_getaffinity(0))
        request = {
            "main": main, "arguments": list(arguments), "fds": list(fds), "environment": environment, "cores": cores,
        }  # fmt: skip
        with _surroundings() as here:
            while True:
                server = self.present(environment)
                try:
                    return server.fork(request, [*here, *fds])
                except _CannotFork as reason:
                    # Another may fare better than one that was killed from outside, or dismissed meanwhile.
                    if self._dismiss(server) and not server.proved:
                        self._failures += 1
                        if self._failures == _TRIES:
                            self._given_up = str(reason)
                            raise

    def present(self, environment: dict[str, str]) -> _Server:
        """The server, started or replaced where necessary.

        Raises:
            _CannotFork: where none will do.
        """
        bound = [name for name in _BINDING if name in environment]
        if bound:
            raise _CannotFork(f"{bound[0]} binds threads when a process starts")
        fixed = _fixed(environment)
        with self._lock:
            if self._given_up:
                raise _CannotFork(self._given_up)
            if self._server is not None and self._server.fixed != fixed:
                self._retire(self._server)
            self._dismissed = [server for server in self._dismissed if server.process.poll() is None]
            if self._server is None:
                one = {**environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
                try:
                    self._server = _Server(one, fixed)
                except OSError as error:
                    self._given_up = str(error)
                    raise _CannotFork(self._given_up) from error
            return self._server

    def _dismiss(self, server: _Server) -> bool:
        with self._lock:
            present = self._server is server
            if present:
                self._retire(server)
            return present

    def _retire(self, server: _Server) -> None:
        server.dismiss()
        self._dismissed.append(server)
        self._server = None

    def close(self) -> None:
        """End all servers. Another one is started when it is needed."""
        with self._lock:
            if self._server is not None:
                self._retire(self._server)
            deadline = time.monotonic() + _END_SECONDS
            for server in self._dismissed:
                server.end(max(0.0, deadline - time.monotonic()))
            self._dismissed = []

    def forked(self) -> None:
        """In a fork of the owner: the servers are another's."""
        servers = [self._server, *self._dismissed]
        self.__init__()
        for server in servers:
            if server is not None:
                server.requests.close()
                # Not a child of this process: nothing to wait for, nothing to warn about.
                server.process.returncode = 0


def _fixed(environment: dict[str, str]) -> Any:
    """What a fork cannot have in another way than its server."""
    read = {k: v for k, v in environment.items() if k.startswith(_READ_AT_LOAD) and k != "PYTHONPATH"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        del read[name]  # each worker sets its own
    return read, sys.executable, os.getresuid(), os.getresgid()


@contextlib.contextmanager
def _surroundings() -> Generator[list[int]]:
    """Descriptors of this folder and of what standard output and error are now."""
    with contextlib.ExitStack() as stack:
        try:
            here = os.open(".", os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise _CannotFork(f"the working folder cannot be opened: {error}") from error
        stack.callback(os.close, here)
        nowhere = os.open(os.devnull, os.O_RDWR)
        stack.callback(os.close, nowhere)
        streams: list[int] = []
        for number in (1, 2):
            try:
                os.fstat(number)
                streams.append(number)
            except OSError:
                streams.append(nowhere)
        yield [here, *streams]


_nursery = _Nursery()
os.register_at_fork(after_in_child=_nursery.forked)
# Made before any session, so that it is called after their ends at exit.
weakref.finalize(_nursery, _nursery.close)
