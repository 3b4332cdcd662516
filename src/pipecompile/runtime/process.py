"""A worker process as its owner holds it: forked by a server, with the face of a Popen."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

from pipecompile.runtime import control

#: How long the server may take to say how a worker ended that is gone already.
_REPORT_SECONDS = 2.0


class Process(Protocol):
    """What the runtime needs of ``subprocess.Popen``."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, or raise ``subprocess.TimeoutExpired``."""
        ...

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        ...


class Forked:
    """Implements :class:`Process` for a worker that is a child of the fork server.

    The pidfd means this process for ever, so no signal can reach another one that got its number.
    Both descriptors are closed when the end is known.
    """

    def __init__(self, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.pid, self.returncode = pid, None
        self._pidfd, self._channel = pidfd, channel
        self._waiting, self._open = threading.Lock(), threading.Lock()

    returncode: int | None
    orphan = False
    """Whether the server went first, and took the worker with it."""

    def poll(self) -> int | None:
        """See :class:`Process`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See :class:`Process`. Any thread may wait, also several."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._waiting.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(str(self), timeout or 0.0)
        try:
            if self.returncode is None:
                self._await(deadline)
            if self.returncode is None:
                raise subprocess.TimeoutExpired(str(self), timeout or 0.0)
            return self.returncode
        finally:
            self._waiting.release()

    def _await(self, deadline: float | None) -> None:
        said, ended = _poller(self._channel.fileno()), _poller(self._channel.fileno(), self._pidfd)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not ended.poll(left):
            return
        report = None
        if said.poll(_REPORT_SECONDS * 1000):
            report = control.receive(self._channel)
        # Without its server nobody knows how it ended; the kernel has killed it then, see lifeline.
        self.orphan = report is None
        self.returncode = -signal.SIGKILL if report is None else int(report["code"])
        with self._open:
            os.close(self._pidfd)
            self._channel.close()

    def kill(self) -> None:
        """See :class:`Process`."""
        with self._open, contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __str__(self) -> str:
        return f"worker process {self.pid}"


def ending(process: Process, progress: str) -> str:
    """What to tell about a worker that is gone (within a second): how it ended, where it was, what may be why."""
    try:
        code = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return f"closed its socket {progress}"
    if code >= 0:
        return f"exited with code {code} {progress}"
    orphan = isinstance(process, Forked) and process.orphan
    why = "the process that workers are forked from was killed first" if orphan else "the system may be out of memory"
    hint = f"; {why}" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name} {progress}{hint}"


def halted(process: Process) -> bool:
    """Whether somebody has stopped a process: SIGSTOP, or a debugger. It then waits for nothing but to be let go on."""
    try:
        # The second field is the name, in brackets, and may hold anything.
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][:1] in ("T", "t")
    except OSError:  # it is gone, which its control socket tells
        return False


def _poller(*fds: int) -> select.poll:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return poller
