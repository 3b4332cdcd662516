"""Worker processes that carry out commands, a step or a stream: one of them, and all that belong together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from pipecompile.errors import PipelineError, WorkerDied, WorkerHung
from pipecompile.ir.package import DeviceModule
from pipecompile.runtime import nursery, pickled
from pipecompile.runtime.channels.link import PortInfo
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.channels.shared_memory import allocate, attach
from pipecompile.runtime.process import Process, ending, halted
from pipecompile.runtime.records import Records, Wait


class Worker:
    """One process, its two sockets and its records, which number what went through ports (``counted``)."""

    def __init__(self, module: DeviceModule, ports: Sequence[PortInfo], counted: str = "message") -> None:
        self.module, self.ports, self._counted = module, ports, counted
        self.records_fd = allocate("records", Records.nbytes(len(ports) + 1))
        self.records = Records(attach(self.records_fd), len(ports) + 1)
        self.control, self._their_control = socket.socketpair()
        self.commands, self._their_commands = socket.socketpair()
        self.process: Process | None = None

    def start(self, fds: Sequence[int], core: int | None, threads: int) -> None:
        """Start the process; it waits for its boot message."""
        theirs = [self._their_control.fileno(), self._their_commands.fileno()]
        arguments = ["--control", str(theirs[0]), "--commands", str(theirs[1])]
        arguments += ["--core", str(-1 if core is None else core)]
        self.process = nursery.start(
            "pipecompile.runtime.step_worker", arguments, [*theirs, self.records_fd, *fds], threads
        )
        self._their_control.close()
        self._their_commands.close()

    def say(self, message: Any, what: str = "a command") -> None:
        """Send a message.

        Raises:
            PipelineError: if it cannot be pickled; ``what`` is in it.
            WorkerDied: if the process is gone.
        """
        try:
            pickled.send(self.commands, message)
        except OSError:
            raise self.death() from None
        except Exception as error:  # pickling runs user code
            raise PipelineError(f"{what} cannot be sent to {self}: {type(error).__name__}: {error}") from error

    def hear(self, timeout: float) -> tuple[Any, ...]:
        """The next message, waited for at most ``timeout`` seconds."""
        self.commands.settimeout(timeout)
        try:
            return pickled.receive(self.commands)
        except TimeoutError:
            raise WorkerHung(f"{self} did not answer within {timeout:.0f} s") from None

    def death(self) -> WorkerDied:
        """The exception for a process that is gone."""
        assert self.process is not None
        return WorkerDied(f"{self} {ending(self.process, self.progress())}")

    def progress(self) -> str:
        """Where the device is, in words."""
        last = self.records.last()
        if last is None:
            return "before its first message"
        where = str(self.ports[last.port]) if last.port >= 0 else "the norm of the gradients"
        return f"{'after' if last.end else 'while'} waiting for {where} ({self._counted} {last.sample})"

    def stop(self) -> None:
        """Kill the process, reap it, close everything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for channel in (self.control, self._their_control, self.commands, self._their_commands):
            channel.close()
        if self.records_fd >= 0:
            os.close(self.records_fd)
            self.records_fd = -1

    def __str__(self) -> str:
        return f"device {self.module.device} (stages {', '.join(map(str, self.module.stages))})"


class Deadlock(PipelineError):
    """Every device waits for another."""


def standstill(
    workers: Sequence[Worker], begun: float, limit: float, waits: Callable[[Wait], bool]
) -> PipelineError | None:
    """The error if a device has computed for over ``limit`` seconds, or all have waited as long (from ``begun`` on).

    ``waits`` says of a device's last record whether it still does.
    """
    now, waiting = clock(), list[float]()
    for worker in workers:
        last = worker.records.last()
        computing = last is None or not waits(last)
        since = now - max(begun, 0.0 if last is None else last.end or last.begin)
        if computing and since > limit:
            return WorkerHung(f"{worker} made no progress for {since:.1f} s {worker.progress()}")
        waiting.append(0.0 if computing else since)
    if waiting and min(waiting) > limit:
        for worker in workers:
            if worker.process is not None and halted(worker.process):
                text = f"{worker} made no progress for {min(waiting):.1f} s: its process is stopped {worker.progress()}"
                return WorkerHung(text)
        where = "; ".join(f"{worker} {worker.progress()}" for worker in workers)
        return Deadlock(f"deadlock, every device waits: {where}")
    return None


class Crew:
    """What has to be gone afterwards. Knows nothing of who commands the workers."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.fds: list[int] = []
        self.owner = os.getpid()

    def stop(self) -> None:
        """Kill, reap, close. May be repeated; does nothing in a fork."""
        if os.getpid() != self.owner:
            return
        for worker in self.workers:
            worker.stop()
        for fd in self.fds:
            os.close(fd)
        self.workers, self.fds = [], []


__all__ = ["Crew", "Deadlock", "Worker", "standstill"]
