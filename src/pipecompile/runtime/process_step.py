"""Runs training steps in worker processes, one a device, and watches over them."""

from __future__ import annotations

import os
import select
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipecompile.errors import PipelineClosed, PipelineError, StepError
from pipecompile.ir.cluster import Link
from pipecompile.ir.deal import gathered
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.program import HOST
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.runtime import numerics, pickled
from pipecompile.runtime.arena import adopt
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.channels.shared_memory import SharedEdge
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.host_step import HostPorts
from pipecompile.runtime.second_look import SecondLook
from pipecompile.runtime.step_crew import Crew, Worker, standstill
from pipecompile.runtime.step_device import Boot
from pipecompile.runtime.step_run import Outcome, failure, written_by
from pipecompile.runtime.step_spans import DeviceSpans
from pipecompile.runtime.training import Training

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
        training: Training,
        *,
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
    ) -> None:
        self._step, self.closed, self._done = step, "it never started", 0
        self._weights = adopt(dict(weights))
        self._places: dict[str, torch.Tensor] = {}
        if training.optimizer is None:
            owned = [name for names in step.owned.values() for name in names]
            self._places = {name: torch.zeros_like(weights[name]).detach() for name in owned}
        self._gradients = adopt(self._places)
        self._answers: dict[int, Outcome] = {}
        self._pending, self._whole, self._alarm = False, False, SecondLook()
        self._crew = crew = Crew()
        self._updating: list[Worker] = []
        self._finalizer = weakref.finalize(self, crew.stop)
        planned = sum(stage.load for stage in step.package.plan.pipeline) * step.micro_batches
        self._limit = max(_HANG_SECONDS, _HANG_FACTOR * planned) if hang_seconds is None else hang_seconds
        try:
            self._open(training, dict(throttle or {}))
        except BaseException:
            crew.stop()
            raise
        self.closed = ""

    def _open(self, training: Training, throttle: dict[str, Link]) -> None:
        step, package, crew = self._step, self._step.package, self._crew
        sizes = bounds(package, None)
        edges = {e.name: SharedEdge.create(e, sizes) for e in package.program.edges if e.slots}
        try:
            for module in package.modules:
                mine = tuple(e for e in package.program.edges if e.slots and _touches(e.source, e.target, module))
                worker = Worker(module, ports_of(mine, module.stages))
                crew.workers.append(worker)
                arenas = (*self._weights.arenas, *self._gradients.arenas)
                device = package.plan.cluster.devices[module.device]
                fds = [*(arena.fd for arena in arenas), *(fd for e in mine for fd in edges[e.name].fds)]
                worker.start(fds, device.core, device.threads)
                owned = {s: step.owned[s] for s in module.stages if s in step.owned}
                names = [name for own in owned.values() for name in own] if self._places else []
                boot = Boot(
                    module=module,
                    edges=mine,
                    fds={e.name: edges[e.name].fds for e in mine},
                    sizes=sizes,
                    throttle={name: link for name, link in throttle.items() if any(e.name == name for e in mine)},
                    records=worker.records_fd,
                    arenas=tuple(arena.fd for arena in arenas),
                    state=self._weights.describe(module.state),
                    owned=owned,
                    training=training if _computes_loss(package, module) else replace(training, loss_fn=None),
                    out_tree=package.out_tree,
                    gradients=[
                        {**entry, "arena": entry["arena"] + len(self._weights.arenas) if entry["nbytes"] else -1}
                        for entry in self._gradients.describe(names)
                    ],
                    micro_batches=package.program.micro_batches,
                    deal=package.program.deal(module.stages[0]),
                    written=tuple(written_by(package, module)),
                    threads=device.threads,
                    numerics=numerics.snapshot(),
                    imports=package.imports,
                )
                worker.say(boot, "loss_fn, the optimizer or a class in the model's result")
            self._host = HostPorts(package, lambda e: edges[e.name].sender(), lambda e: edges[e.name].receiver())
            mine = tuple(e for e in package.program.edges if HOST in (e.source, e.target))
            self._signals = {
                e.name: edges[e.name].credits if e.source == HOST else edges[e.name].arrivals for e in mine
            }
            crew.fds += [fd for e in mine for fd in edges[e.name].fds[1:]]
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
        self._begin(request)
        found = gathered([outcome.losses for outcome in self._end() if outcome.losses])
        return [torch.tensor(value, dtype=getattr(torch, dtype)) for value, dtype in found]

    def forward(self, request: StepRequest) -> list[dict[str, Any]]:
        """See ``Trainer``."""
        if self._pending:
            self._abandon()
        self._begin(request)
        self._pending = True
        with self._closing():
            self._await(lambda: self._host.complete or self._host.failed)
        if not self._host.complete:
            self._abandon()
        return self._host.results

    def backward(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """See ``Trainer``."""
        self._host.answer(gradients)
        given = [name for outcome in self._end() for name in outcome.given]
        return {name: self._places[name] for name in given}

    def _begin(self, request: StepRequest) -> None:
        self._check()
        self._whole = False
        package, weights = self._step.package, list(request.weights)
        with self._closing():
            self._answers = {}
            self._host.begin(self._done, request.leaves)
            for worker in self._crew.workers:
                targets = pickled.packed(request.targets) if _computes_loss(package, worker.module) else None
                worker.say(("step", self._done, request.number, request.update, request.clip, targets, weights))

    def _end(self) -> list[Outcome]:
        """Wait for all answers; what failed is put back if it can be."""
        with self._closing():
            self._await(lambda: len(self._answers) == len(self._crew.workers))
            outcomes = [self._answers[worker.module.device] for worker in self._crew.workers]
            self._done += 1
            self._pending = False
            error = failure(outcomes)
            if error is not None and not any(outcome.updated for outcome in outcomes):
                self._ask("roll_back")
        if error is None:
            self._whole = True
            return outcomes
        if any(outcome.updated for outcome in outcomes):
            self._fail(error)
        raise error

    def _abandon(self) -> None:
        """Give up half a step. Buffers stay as its forward left them, unless a stage raised."""
        self._host.drain()
        with self._closing():
            self._await(lambda: len(self._answers) == len(self._crew.workers))
        if any(outcome.error for outcome in self._answers.values()):
            self._end()
        self._done += 1
        self._pending = False

    def _await(self, until: Callable[[], bool]) -> None:
        """Carry messages of the caller, add up norms and collect answers of workers."""
        workers = self._crew.workers
        norms: dict[int, float] = {}
        begun = clock()
        channels = {worker.commands.fileno(): worker for worker in workers}
        while True:
            # Once a device has failed the rest is carried without being looked at.
            if self._host.failed:
                waits = not self._host.drain()
            else:
                self._host.move()
                waits = False
            if until():
                return
            poller = select.poll()
            for fd in (*channels, *(self._signals[edge] for edge in self._host.waits())):
                poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll(1 if waits else int(min(self._limit / 4, 1.0) * 1000)):
                if fd not in channels:
                    continue
                worker = channels[fd]
                kind, value = self._heard(worker)
                if kind == "norm":
                    norms[worker.module.device] = value
                else:
                    self._answers[worker.module.device] = value
            failed = any(not outcome.whole for outcome in self._answers.values())
            if norms and (failed or len(norms) == len(self._updating)):
                total = None if failed else sum(norms[device] for device in sorted(norms))
                for worker in self._updating:
                    if worker.module.device in norms:
                        worker.say(("norm", total))
                norms.clear()
            self._watch([w for w in workers if w.module.device not in self._answers], begun)

    @contextmanager
    def _closing(self) -> Generator[None]:
        """Whatever is raised meanwhile ends the workers."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _heard(self, worker: Worker) -> tuple[str, Any]:
        try:
            answer = worker.hear(_START_SECONDS)
        except EOFError:
            raise worker.death() from None
        if answer[0] == "error":
            raise StepError(answer[1])
        return answer[0], answer[1]

    def _watch(self, workers: Sequence[Worker], begun: float) -> None:
        alarm = standstill(workers, begun, self._limit, lambda last: not last.end and last.begin >= begun)
        if alarm is not None and self._alarm.confirms(worker.records for worker in workers):
            raise alarm

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

    def spans(self) -> list[DeviceSpans]:
        """See ``Trainer``."""
        if not self._whole:
            return []
        answers = zip(self._crew.workers, self._ask("spans"), strict=True)
        return [
            DeviceSpans(worker.module.device, spans, waits, worker.ports, end)
            for worker, (spans, waits, end) in answers
        ]

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """See ``Trainer``."""
        state: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for packed, own in self._ask("state"):
            state.update(pickled.unpacked(packed))
            groups.update(own)
        return state, groups

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
        """See ``Trainer``."""
        self._ask("load", pickled.packed(dict(state)), [dict(group) for group in settings])

    def set(self, settings: Mapping[str, Any], group: int | None = None) -> None:
        """See ``Trainer``."""
        self._ask("set", dict(settings), group)

    def close(self) -> None:
        """See ``Trainer``. Between steps nothing is under way, so workers simply end."""
        self.closed = self.closed or "it was closed"
        self._updating = []
        self._host.close()
        self._crew.stop()

    def _check(self) -> None:
        if self.closed or os.getpid() != self._crew.owner:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self.closed or 'another process owns it'}")

    def _fail(self, error: BaseException) -> None:
        self.closed = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self.close()


def _computes_loss(package: Package, module: DeviceModule) -> bool:
    return any(package.plan.ends(stage) for stage in module.stages)


def _touches(source: int, target: int, module: DeviceModule) -> bool:
    return source in module.stages or target in module.stages


__all__ = ["ProcessTrainer"]
