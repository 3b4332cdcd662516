"""Runs training steps in worker processes, one a device, and watches over them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import PipelineClosed, PipelineError, StepError, WorkerDied, WorkerHung
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import HOST
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.runtime import numerics, pickled
from pipecompile.runtime.allocator import ENVIRONMENT
from pipecompile.runtime.arena import adopt
from pipecompile.runtime.channels.link import PortInfo, ports_of
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, allocate, attach
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.lifeline import born_here
from pipecompile.runtime.records import Records
from pipecompile.runtime.step_device import Boot
from pipecompile.runtime.step_run import Outcome, failure, written_by
from pipecompile.runtime.update import OptimizerFactory

_START_SECONDS = 60.0
_HANG_SECONDS, _HANG_FACTOR = 5.0, 10.0


class ProcessTrainer:
    """Implements :class:`pipecompile.runtime.inline_step.Trainer` with worker processes.

    Weights move into shared memory; gradients and optimizers live in the workers. A step is one
    command to every worker and one answer of each; activations, gradients and inputs travel in
    rings meanwhile. ``hang_seconds`` is how long a device may compute without reaching its next
    message; ``throttle`` slows edges down.
    """

    def __init__(
        self,
        step: StepPackage,
        weights: Mapping[str, torch.Tensor],
        loss_fn: Callable[[Any, Any], Any],
        optimizer: OptimizerFactory,
        seed: int,
        *,
        keep_gradients: bool = False,
        check_finite: bool = False,
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
    ) -> None:
        self._step, self.closed, self._done = step, "it never started", 0
        self._weights = adopt(dict(weights))
        self._crew = crew = _Crew()
        self._updating: list[Worker] = []
        self._finalizer = weakref.finalize(self, crew.stop)
        planned = sum(stage.load for stage in step.package.plan.stages) * step.micro_batches
        self._limit = max(_HANG_SECONDS, _HANG_FACTOR * planned) if hang_seconds is None else hang_seconds
        try:
            self._open(loss_fn, optimizer, seed, keep_gradients, check_finite, dict(throttle or {}))
        except BaseException:
            crew.stop()
            raise
        self.closed = ""

    def _open(
        self,
        loss_fn: Callable[[Any, Any], Any],
        optimizer: OptimizerFactory,
        seed: int,
        keep_gradients: bool,
        check_finite: bool,
        throttle: dict[str, Link],
    ) -> None:
        step, package, crew = self._step, self._step.package, self._crew
        sizes = bounds(package, None)
        edges = {e.name: SharedEdge.create(e, sizes) for e in package.program.edges if e.slots}
        position = {name: i for i, name in enumerate(package.input_names)}
        last = len(package.plan.stages) - 1
        try:
            for module in package.modules:
                mine = tuple(e for e in package.program.edges if e.slots and _touches(e.source, e.target, module))
                worker = Worker(module, ports_of(mine, module.stages))
                crew.workers.append(worker)
                arenas = tuple(arena.fd for arena in self._weights.arenas)
                device = package.plan.cluster.devices[module.device]
                worker.start([*arenas, *(fd for e in mine for fd in edges[e.name].fds)], device.core, device.threads)
                boot = Boot(
                    module, mine, {e.name: edges[e.name].fds for e in mine}, sizes,
                    {name: link for name, link in throttle.items() if any(e.name == name for e in mine)},
                    worker.records_fd, arenas, self._weights.describe(module.state),
                    {s: step.owned[s] for s in module.stages if s in step.owned}, optimizer,
                    loss_fn if last in module.stages else None, package.out_tree, seed, keep_gradients,
                    check_finite, step.micro_batches, tuple(written_by(package, module)), device.threads,
                    numerics.snapshot(), package.imports,
                )  # fmt: skip
                worker.say(boot, "loss_fn, the optimizer or a class in the model's result")
            self._inputs = [
                (edges[e.name].sender(), tuple(position[v] for v in e.values))
                for e in package.program.edges
                if e.source == HOST
            ]
            self._credits = [edges[e.name].credits for e in package.program.edges if e.source == HOST]
            crew.fds += self._credits + [edges[e.name].arrivals for e in package.program.edges if e.source == HOST]
        finally:
            kept = set(crew.fds)
            for edge in edges.values():
                for fd in edge.fds:
                    if fd not in kept:
                        os.close(fd)
        self._updating = [w for w in crew.workers if any(step.owned.get(s) for s in w.module.stages)]
        for worker in crew.workers:
            answer = worker.hear(_START_SECONDS)
            if answer[0] != "ready":
                raise PipelineError(f"{worker} could not start: {answer[1]}")
            os.close(worker.records_fd)
            worker.records_fd = -1

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(worker.process.pid for worker in self._crew.workers if worker.process is not None)

    def step(self, request: StepRequest) -> list[torch.Tensor]:
        """See ``Trainer``."""
        self._check()
        last = len(self._step.package.plan.stages) - 1
        try:
            for worker in self._crew.workers:
                targets = pickled.packed(request.targets) if last in worker.module.stages else None
                weights = list(request.weights)
                worker.say(("step", self._done, request.number, request.update, request.clip, targets, weights))
            outcomes = self._await(request)
            self._done += 1
            error = failure(outcomes)
            if error is not None and not any(outcome.updated for outcome in outcomes):
                self._ask("roll_back")
        except BaseException as error:
            self._fail(error)
            raise
        if error is not None:
            if any(outcome.updated for outcome in outcomes):
                self._fail(error)
            raise error
        found = [loss for outcome in outcomes for loss in outcome.losses]
        return [torch.tensor(value, dtype=getattr(torch, dtype)) for value, dtype in found]

    def _await(self, request: StepRequest) -> list[Outcome]:
        """Feed inputs as slots are posted, add up norms, and collect every worker's answer."""
        workers = self._crew.workers
        answers: dict[int, Outcome] = {}
        norms: dict[int, float] = {}
        count, begun = len(request.leaves), clock()
        base = self._done * count
        poller = select.poll()
        channels = {worker.commands.fileno(): worker for worker in workers}
        for fd in (*channels, *self._credits):
            poller.register(fd, select.POLLIN)
        while len(answers) < len(workers):
            for sender, where in self._inputs:
                while sender.sample < base + count and sender.ready():
                    leaves = request.leaves[sender.sample - base]
                    sender.put(sender.sample, *[leaves[i].detach() for i in where])
                if sender.sample == base + count:
                    with contextlib.suppress(KeyError):
                        poller.unregister(self._credits[self._inputs.index((sender, where))])
            for fd, _ in poller.poll(int(min(self._limit / 4, 1.0) * 1000)):
                if fd not in channels:
                    continue
                worker = channels[fd]
                kind, value = self._heard(worker)
                if kind == "norm":
                    norms[worker.module.device] = value
                else:
                    answers[worker.module.device] = value
            failed = any(not outcome.whole for outcome in answers.values())
            if norms and (failed or len(norms) == len(self._updating)):
                total = None if failed else sum(norms[device] for device in sorted(norms))
                for worker in self._updating:
                    if worker.module.device in norms:
                        worker.say(("norm", total))
                norms.clear()
            self._watch([w for w in workers if w.module.device not in answers], begun)
        return [answers[worker.module.device] for worker in workers]

    def _heard(self, worker: Worker) -> tuple[str, Any]:
        try:
            answer = worker.hear(_START_SECONDS)
        except EOFError:
            raise worker.death() from None
        if answer[0] == "error":
            raise StepError(answer[1])
        return answer[0], answer[1]

    def _watch(self, workers: Sequence[Worker], begun: float) -> None:
        now = clock()
        waiting: list[float] = []
        for worker in workers:
            last = worker.records.last()
            computing = last is None or last.end > 0 or last.begin < begun
            since = now - max(begun, 0.0 if last is None else last.end or last.begin)
            if computing and since > self._limit:
                raise WorkerHung(f"{worker} made no progress for {since:.1f} s {worker.progress()}")
            waiting.append(0.0 if computing else since)
        if waiting and min(waiting) > self._limit:
            where = "; ".join(f"{worker} {worker.progress()}" for worker in workers)
            raise PipelineError(f"deadlock, every device waits: {where}")

    def _ask(self, *message: Any) -> list[Any]:
        """One command to all workers; their answers in the order of devices."""
        self._check()
        try:
            for worker in self._crew.workers:
                worker.say(message)
            return [self._heard(worker)[1] for worker in self._crew.workers]
        except BaseException as error:
            self._fail(error)
            raise

    def gradients(self) -> dict[str, torch.Tensor]:
        """See ``Trainer``."""
        return {name: g for answer in self._ask("gradients") for name, g in pickled.unpacked(answer).items()}

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """See ``Trainer``."""
        state: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for packed, own in self._ask("state"):
            state.update(pickled.unpacked(packed))
            groups.update(own)
        return state, groups

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        """See ``Trainer``."""
        self._ask("load", pickled.packed(dict(state)), dict(settings))

    def set(self, settings: Mapping[str, Any]) -> None:
        """See ``Trainer``."""
        self._ask("set", dict(settings))

    def close(self) -> None:
        """See ``Trainer``. Between steps nothing is under way, so workers simply end."""
        self.closed = self.closed or "it was closed"
        self._inputs, self._updating = [], []
        self._crew.stop()

    def _check(self) -> None:
        if self.closed or os.getpid() != self._crew.owner:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self.closed or 'another process owns it'}")

    def _fail(self, error: BaseException) -> None:
        self.closed = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self.close()


class Worker:
    """One process, its two sockets and its records."""

    def __init__(self, module: DeviceModule, ports: Sequence[PortInfo]) -> None:
        self.module, self.ports = module, ports
        self.records_fd = allocate("records", Records.nbytes(len(ports) + 1))
        self.records = Records(attach(self.records_fd), len(ports) + 1)
        self.control, self._their_control = socket.socketpair()
        self.commands, self._their_commands = socket.socketpair()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, fds: Sequence[int], core: int | None, threads: int) -> None:
        """Start the process; it waits for its boot message."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        count = str(threads)
        environment = {
            **os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONPATH": path,
        }  # fmt: skip
        theirs = [self._their_control.fileno(), self._their_commands.fileno()]
        command = [sys.executable, "-P", "-m", "pipecompile.runtime.step_worker"]
        command += ["--control", str(theirs[0]), "--commands", str(theirs[1])]
        command += ["--parent", str(os.getpid()), "--core", str(-1 if core is None else core)]
        self.process = born_here(
            lambda: subprocess.Popen(
                command,
                pass_fds=[*theirs, self.records_fd, *fds],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
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
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"{self} closed its socket {self.progress()}")
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        hint = "; the system may be out of memory" if code == -signal.SIGKILL else ""
        return WorkerDied(f"{self} {how} {self.progress()}{hint}")

    def progress(self) -> str:
        """Where the device is, in words."""
        last = self.records.last()
        if last is None:
            return "before its first message"
        where = str(self.ports[last.port]) if last.port >= 0 else "the norm of the gradients"
        return f"{'after' if last.end else 'while'} waiting for {where} (message {last.sample})"

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


class _Crew:
    """What has to be gone afterwards. Knows nothing of the trainer."""

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


def _touches(source: int, target: int, module: DeviceModule) -> bool:
    return source in module.stages or target in module.stages


__all__ = ["ProcessTrainer"]
