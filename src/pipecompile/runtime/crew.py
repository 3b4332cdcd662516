"""The worker processes of a session: started together, told apart when they fail, gone afterwards."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipecompile.errors import PipelineError, StageError, WorkerDied, WorkerHung
from pipecompile.ir.cluster import Device, Link
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.program import Program
from pipecompile.runtime import numerics, nursery
from pipecompile.runtime.arena import Weights
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, allocate, attach
from pipecompile.runtime.control import receive, send
from pipecompile.runtime.process import Process, ending, halted
from pipecompile.runtime.records import Records

_START_SECONDS = 60.0
_HANG_SECONDS = 2.0
_HANG_FACTOR = 10.0


class Worker:
    """One process, its control socket and its records."""

    def __init__(self, module: DeviceModule, package: Package, device: Device, hang_seconds: float | None) -> None:
        self.module, self.device = module, device
        self.ports = ports_of(package.program.edges, module.stages, module.replica)
        self.records_fd = allocate("records", Records.nbytes(len(self.ports)))
        self.records = Records(attach(self.records_fd), len(self.ports))
        planned = sum(
            stage.seconds if stage.measured is None else stage.measured
            for stage in package.plan.stages
            if stage.index in module.stages
        )
        self.limit = max(_HANG_SECONDS, _HANG_FACTOR * planned) if hang_seconds is None else hang_seconds
        self.process: Process | None = None
        self.ready = math.inf
        self.control, self._theirs = socket.socketpair()
        self.control.settimeout(_START_SECONDS)

    def start(self, fds: Sequence[int]) -> None:
        """Start the process; it waits for its boot message."""
        number = self._theirs.fileno()
        self.process = nursery.start(
            "pipecompile.runtime.worker",
            ["--fd", str(number)],
            [number, self.records_fd, *fds],
            self.device.threads,
        )
        self._theirs.close()

    def kill(self) -> None:
        """Kill the process if it lives, and reap it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Kill the process and close its descriptors."""
        self.kill()
        self.control.close()
        self._theirs.close()
        if self.records_fd >= 0:
            os.close(self.records_fd)
            self.records_fd = -1

    def progress(self) -> str:
        """Where the device is, in words."""
        last = self.records.last()
        if last is None:
            return "before the first sample"
        if last.end:
            return f"while computing sample {last.sample}"
        return f"while waiting for {self.ports[last.port]} (sample {last.sample})"

    @property
    def sample(self) -> int:
        """The sample the device computes or waits for; -1 before the first."""
        last = self.records.last()
        return -1 if last is None else last.sample

    def computing(self) -> float:
        """Seconds since the device last had to wait, or was ready to; 0 while it waits."""
        last = self.records.last()
        if last is None:
            return clock() - self.ready
        return clock() - last.end if last.end else 0.0

    def waiting(self) -> float:
        """Seconds the device has been waiting; 0 while it computes."""
        last = self.records.last()
        return clock() - last.begin if last is not None and not last.end else 0.0

    def __str__(self) -> str:
        module = self.module
        copy = f", replica {module.replica} of {module.replicas}" if module.replicas > 1 else ""
        return f"device {module.device} (stages {', '.join(map(str, module.stages))}{copy})"


class Crew:
    """All workers of a session and the descriptors shared with them. Knows nothing of the session."""

    def __init__(self, package: Package, hang_seconds: float | None, threads: int | None) -> None:
        self._owner, self._stopped = os.getpid(), False
        self._fds: list[int] = []
        self.workers: list[Worker] = []
        devices = package.plan.cluster.devices
        try:
            for module in package.modules:
                known = module.device < len(devices)
                device = devices[module.device] if known else Device(f"cpu:{module.device}")
                if threads is not None:
                    device = Device(device.name, device.kind, device.core, threads, device.speed)
                self.workers.append(Worker(module, package, device, hang_seconds))
        except BaseException:
            self.stop()
            raise

    def own(self, fds: Sequence[int]) -> None:
        """Close these descriptors when the crew stops."""
        self._fds.extend(fds)

    def start(
        self,
        package: Package,
        weights: Weights,
        edges: Mapping[str, SharedEdge],
        sizes: Mapping[str, int],
        throttle: Mapping[str, Link],
    ) -> None:
        """Start all workers and wait until each waits for its first message.

        Raises:
            PipelineError: naming the device and the reason, if one does not get there in 60 s.
        """
        arenas = [arena.fd for arena in weights.arenas]
        settings = numerics.snapshot()
        for worker in self.workers:
            mine = tuple(dict.fromkeys(port.edge for port in worker.ports))
            fds = [fd for edge in mine for fd in edges[edge.name].fds]
            worker.start([*arenas, *fds])
        for worker in self.workers:
            module = worker.module
            mine = tuple(dict.fromkeys(port.edge for port in worker.ports))
            boot: dict[str, Any] = {
                "device": module.device,
                "stages": list(module.stages),
                "replica": module.replica,
                "replicas": module.replicas,
                "source": module.source,
                "filename": module.filename,
                "imports": list(package.imports),
                "core": worker.device.core,
                "threads": worker.device.threads,
                "numerics": settings,
                "program": Program((), mine).to_json(),
                "sizes": dict(sizes),
                "throttle": {name: [link.latency, link.bandwidth] for name, link in throttle.items()},
                "edges": {edge.name: list(edges[edge.name].fds) for edge in mine},
                "records": worker.records_fd,
                "arenas": arenas,
                "state": weights.describe(module.state),
            }
            # A worker that is gone already says why below.
            with contextlib.suppress(ConnectionError):
                send(worker.control, boot)
        self._await_ready(time.monotonic() + _START_SECONDS)
        for worker in self.workers:
            os.close(worker.records_fd)
            worker.records_fd = -1

    def _await_ready(self, deadline: float) -> None:
        waiting = {worker.control.fileno(): worker for worker in self.workers}
        poller = select.poll()
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        while waiting:
            events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                names = ", ".join(str(worker) for worker in waiting.values())
                raise PipelineError(f"{names} did not start within {_START_SECONDS:.0f} s")
            for fd, _ in events:
                worker = waiting.pop(fd)
                poller.unregister(fd)
                message = receive(worker.control)
                if message is None or message["kind"] != "ready":
                    raise self._error(worker, message)
                worker.control.settimeout(1.0)
                worker.ready = clock()

    def hear(self, fd: int) -> PipelineError:
        """What the worker behind a control socket that became readable says: a StageError of one sample, or its end."""
        worker = next(worker for worker in self.workers if worker.control.fileno() == fd)
        message = receive(worker.control)
        if message is not None and message["kind"] == "failed":
            return StageError(**{key: value for key, value in message.items() if key != "kind"})
        return self._error(worker, message)

    def _error(self, worker: Worker, message: dict[str, Any] | None) -> PipelineError:
        if message is not None:
            what = "could not start" if message["kind"] == "startup" else "stopped"
            return PipelineError(f"{worker} {what}: {message['message']}\n\n{message.get('trace', '')}")
        assert worker.process is not None
        at = {"device": worker.module.device, "sample": worker.sample}
        return WorkerDied(f"{worker} {ending(worker.process, worker.progress())}", **at)

    def stuck(self, submitted: float, slack: float) -> PipelineError | None:
        """The error if a device makes no progress, or if all wait for one another.

        ``submitted`` is when the latest sample came in, ``slack`` what throttles may add.
        """
        for worker in self.workers:
            seconds = worker.computing()
            if seconds > worker.limit:
                text = f"{worker} made no progress for {seconds:.1f} s {worker.progress()}"
                return WorkerHung(text, device=worker.module.device, sample=worker.sample)
        idle = min((worker.waiting() for worker in self.workers), default=0.0)
        limit = slack + max((worker.limit for worker in self.workers), default=0.0)
        if min(idle, clock() - submitted) > limit:
            for worker in self.workers:
                if worker.process is not None and halted(worker.process):
                    text = f"{worker} made no progress for {idle:.1f} s: its process is stopped {worker.progress()}"
                    return WorkerHung(text, device=worker.module.device, sample=worker.sample)
            where = "; ".join(f"{worker} {worker.progress()}" for worker in self.workers)
            return PipelineError(f"deadlock, every device waits: {where}")
        return None

    @property
    def stopped(self) -> bool:
        """Whether its descriptors are closed, and their numbers may be other files by now."""
        return self._stopped

    def kill(self) -> None:
        """Kill and reap what still runs."""
        if os.getpid() == self._owner:
            for worker in self.workers:
                worker.kill()

    def stop(self) -> None:
        """Kill and reap what still runs, close every descriptor. May be repeated; does nothing in a fork."""
        if self._stopped or os.getpid() != self._owner:
            return
        self._stopped = True
        for worker in self.workers:
            worker.stop()
            worker.records = worker.records.frozen()
        for fd in self._fds:
            os.close(fd)
