"""Runs training steps in the caller's process, one thread, devices in turn; on a card each has a stream of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch

from pipecompile.errors import PipelineClosed, PipelineError, StepError
from pipecompile.ir.deal import gathered
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import RingReceiver, RingSender
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.host_step import HostPorts
from pipecompile.runtime.lanes import HostLanes, Lanes
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.step import StepLink
from pipecompile.runtime.step_run import Outcome, StepRun, failure, written_by
from pipecompile.runtime.step_spans import DeviceSpans
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import DeviceUpdates, Handover, LocalBoard


class Trainer(Protocol):
    """Carries out training steps: worker processes or the caller's own."""

    def step(self, request: StepRequest) -> list[torch.Tensor]:
        """One step; the weighted loss of each micro-batch.

        Raises:
            StepError: if a stage raises. Nothing has changed then, or else the trainer is closed.
            WorkerDied: if the process of a device ends; the trainer is closed then.
        """
        ...

    def forward(self, request: StepRequest) -> list[dict[str, Any]]:
        """Half a step, where the caller has the loss: the results of each micro-batch by name.

        A half step before it that was never gone on with is given up.
        """
        ...

    def backward(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The other half: gradients of weights by placeholder name, for those of the results.

        They may be overwritten by the next step.
        """
        ...

    @property
    def closed(self) -> str:
        """Why it cannot be used any more; empty while it can."""
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update by placeholder name, where they are kept."""
        ...

    def spans(self) -> list[DeviceSpans]:
        """What each device did in the latest step; nothing if that is not over, failed, or there was none."""
        ...

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """State and group settings of the optimizers by placeholder name."""
        ...

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
        """Put back what :meth:`optimizer_state` gave, with settings for each group."""
        ...

    def set(self, settings: Mapping[str, Any], group: int | None = None) -> None:
        """Change settings of all parameter groups, or of one."""
        ...

    def close(self) -> None:
        """End; may be repeated."""
        ...


class InlineTrainer:
    """Implements :class:`Trainer` in the caller's process. ``lanes`` say where devices compute."""

    def __init__(
        self, step: StepPackage, weights: Mapping[str, torch.Tensor], training: Training, lanes: Lanes | None = None
    ) -> None:
        package, self._lanes = step.package, HostLanes() if lanes is None else lanes
        self.closed, self._done, self._pending, self._whole = "", 0, False, False
        edges = [edge for edge in package.program.edges if edge.slots]
        room = bounds(package, None)
        place = {stage: module.device for module in package.modules for stage in module.stages}
        local = {e.name: self._lanes.edge(e, room, place.get(e.source), place.get(e.target)) for e in edges}
        self._host = HostPorts(package, lambda e: local[e.name].sender(), lambda e: local[e.name].receiver())
        updating = [m.device for m in package.modules if any(step.owned.get(s) for s in m.stages)]
        self._board = LocalBoard(updating)
        self._criterion = training.criterion(package.out_tree)
        for name in package.imports:
            importlib.import_module(name)
        self._devices: list[_Device] = []
        for module in package.modules:
            infos = ports_of(edges, module.stages)
            ports: list[RingReceiver | RingSender] = [
                local[info.edge.name].receiver(i) if info.receives else local[info.edge.name].sender(i)
                for i, info in enumerate(infos)
            ]
            mine = {s: step.owned[s] for s in module.stages if s in step.owned}
            updates = training.updates(module.device, mine, weights, self._board)
            link = StepLink(weights, ports, updates, training.seed, written_by(package, module))
            link.criterion = self._criterion
            program = package.program
            run = StepRun(module, link, ports, program.micro_batches, program.deal(module.stages[0]))
            self._devices.append(_Device(module.device, link, updates, run, self._lanes))

    def step(self, request: StepRequest) -> list[torch.Tensor]:
        """See :class:`Trainer`."""
        self._begin(request)
        self._run(lambda: not any(device.port is not None for device in self._devices))
        return gathered([outcome.losses for outcome in self._end() if outcome.losses])

    def forward(self, request: StepRequest) -> list[dict[str, Any]]:
        """See :class:`Trainer`."""
        if self._pending:
            self._abandon()
        self._begin(request)
        self._pending = True
        self._run(lambda: self._host.complete or any(device.failed for device in self._devices))
        if not self._host.complete:
            self._abandon()
        return self._host.results

    def backward(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """See :class:`Trainer`."""
        self._host.answer(gradients)
        self._lanes.begin()
        self._run(lambda: not any(device.port is not None for device in self._devices))
        self._end()
        return self.gradients()

    def _begin(self, request: StepRequest) -> None:
        self._whole = False
        if self.closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self.closed}")
        if self._criterion is not None:
            self._criterion.targets = [self._lanes.here(target) for target in request.targets]
            self._criterion.weights = request.weights
        self._board.reset()
        self._host.begin(self._done, request.leaves)
        with self._closing(), stage_mode(1), torch.random.fork_rng(devices=self._lanes.cards):
            self._lanes.begin()
            for device in self._devices:
                device.begin(request, self._done)

    def _run(self, until: Callable[[], bool]) -> None:
        """Let everyone go on in turns."""
        with self._closing(), stage_mode(1), torch.random.fork_rng(devices=self._lanes.cards):
            while not until():
                moved = self._host.move()
                turns = [device.advance() for device in self._devices]  # each gets one
                if any(device.failed for device in self._devices) or self._host.failed:
                    self._board.abandon()
                    self._host.drain()
                elif not moved and not any(turns) and not until():
                    raise PipelineError("deadlock: every device waits")
            self._lanes.finish()

    def _end(self) -> list[Outcome]:
        self._done += 1
        self._pending = False
        outcomes = [device.outcome for device in self._devices]
        error = failure(outcomes)
        if error is None:
            self._whole = True
            return outcomes
        if any(outcome.updated for outcome in outcomes):
            self.closed = f"it failed: {str(error).splitlines()[0]}"
        else:
            for device in self._devices:
                device.link.roll_back()
        raise error

    def _abandon(self) -> None:
        """Give up half a step. Buffers stay as its forward left them, unless a stage raised."""
        self._host.drain()
        self._run(lambda: not any(device.port is not None for device in self._devices))
        if any(device.outcome.error for device in self._devices):
            self._end()
        self._done += 1
        self._pending = False

    @contextmanager
    def _closing(self) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            self.closed = f"it failed: {type(error).__name__}: {error}"
            with suppress(StepError):  # what is under way still uses the rings
                self._lanes.finish()
            raise

    def gradients(self) -> dict[str, torch.Tensor]:
        """See :class:`Trainer`."""
        return {name: g for device in self._devices for name, g in device.updates.latest.items()}

    def spans(self) -> list[DeviceSpans]:
        """See :class:`Trainer`."""
        return [device.spans() for device in self._devices] if self._whole else []

    @property
    def _optimizers(self) -> list[DeviceUpdates]:
        return [device.updates for device in self._devices if isinstance(device.updates, DeviceUpdates)]

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """See :class:`Trainer`."""
        state: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for updates in self._optimizers:
            state.update(updates.state())
            groups.update(updates.groups())
        return state, groups

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
        """See :class:`Trainer`."""
        for updates in self._optimizers:
            updates.load(state, settings)

    def set(self, settings: Mapping[str, Any], group: int | None = None) -> None:
        """See :class:`Trainer`."""
        for updates in self._optimizers:
            updates.set(settings, group)

    def close(self) -> None:
        """See :class:`Trainer`."""
        self.closed = self.closed or "it was closed"


class _Device:
    """One device: its run and, while a step goes on, its generator and the port that waits for."""

    def __init__(
        self, number: int, link: StepLink, updates: DeviceUpdates | Handover, run: StepRun, lanes: Lanes
    ) -> None:
        self.number, self.link, self.updates, self._run, self._lanes = number, link, updates, run, lanes
        link.spans.clock = partial(lanes.now, number)
        self.port: Any = None
        self.outcome = Outcome()
        self._steps: Any = None

    @property
    def failed(self) -> bool:
        """Whether it has given up its part of the step under way."""
        return self._run.failed

    def spans(self) -> DeviceSpans:
        """What it did in the step that is over."""
        seconds = self._lanes.seconds
        found = self.link.spans.spans
        return DeviceSpans(self.number, [(op, stage, seconds(begin), seconds(end)) for op, stage, begin, end in found])

    def begin(self, request: StepRequest, done: int) -> None:
        """Run up to the first wait; ``done`` steps went through these rings before."""
        self.link.number, self.link.parts = request.number, len(request.leaves)
        if isinstance(self.updates, DeviceUpdates):
            self.updates.begin(request.update, request.clip)
        else:
            self.updates.begin()
        self._steps = self._run.run(done)
        self._resume(lambda: self._steps.send(None))

    def advance(self) -> bool:
        """Go on if the present wait is over; whether it was."""
        if self.port is None or not self.port.ready():
            return False
        try:
            value = self.port.take()
        except Exception as error:  # the run says what follows from it
            self._resume(partial(self._steps.throw, error))
        else:
            self._resume(partial(self._steps.send, value))
        return True

    def _resume(self, go_on: Callable[[], Any]) -> None:
        try:
            with self._lanes.of(self.number):
                self.port = go_on()
        except StopIteration as end:
            self.port, self.outcome = None, end.value


__all__ = ["InlineTrainer", "Trainer"]
