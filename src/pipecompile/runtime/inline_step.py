"""Runs training steps in the caller's process, one thread, devices in turn."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from pipecompile.errors import PipelineClosed, PipelineError
from pipecompile.ir.program import HOST
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.local import LocalEdge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.step import StepLink
from pipecompile.runtime.step_run import Outcome, StepRun, failure, written_by
from pipecompile.runtime.update import DeviceUpdates, LocalBoard, OptimizerFactory


class Trainer(Protocol):
    """Carries out training steps: worker processes or the caller's own."""

    def step(self, request: StepRequest) -> list[torch.Tensor]:
        """One step; the weighted loss of each micro-batch.

        Raises:
            StepError: if a stage raises. Nothing has changed then, or else the trainer is closed.
            WorkerDied: if the process of a device ends; the trainer is closed then.
        """
        ...

    @property
    def closed(self) -> str:
        """Why it cannot be used any more; empty while it can."""
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update by placeholder name, where they are kept."""
        ...

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """State and group settings of the optimizers by placeholder name."""
        ...

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        """Put back what :meth:`optimizer_state` gave, with settings for all groups."""
        ...

    def set(self, settings: Mapping[str, Any]) -> None:
        """Change settings of all parameter groups."""
        ...

    def close(self) -> None:
        """End; may be repeated."""
        ...


class InlineTrainer:
    """Implements :class:`Trainer` in the caller's process."""

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
    ) -> None:
        package = step.package
        self._package, self.closed, self._done = package, "", 0
        edges = [edge for edge in package.program.edges if edge.slots]
        room = bounds(package, None)
        local = {edge.name: LocalEdge(edge, room) for edge in edges}
        position = {name: i for i, name in enumerate(package.input_names)}
        self._inputs = [
            (local[e.name].sender(), tuple(position[v] for v in e.values)) for e in edges if e.source == HOST
        ]
        updating = [m.device for m in package.modules if any(step.owned.get(s) for s in m.stages)]
        self._board = LocalBoard(updating)
        self._criterion = Criterion(loss_fn, package.out_tree, finite=check_finite)
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
            updates = DeviceUpdates(module.device, mine, weights, optimizer, self._board, finite=check_finite)
            updates.keep = keep_gradients
            link = StepLink(weights, ports, updates, seed, written_by(package, module))
            link.criterion = self._criterion
            run = StepRun(module, link, ports, step.micro_batches)
            self._devices.append(_Device(link, updates, run))

    def step(self, request: StepRequest) -> list[torch.Tensor]:
        """See :class:`Trainer`."""
        if self.closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self.closed}")
        self._criterion.targets, self._criterion.weights = request.targets, request.weights
        self._board.reset()
        count = len(request.leaves)
        try:
            with stage_mode(1), torch.random.fork_rng(devices=[]):
                for device in self._devices:
                    device.begin(request, self._done)
                while any(device.port is not None for device in self._devices):
                    moved = self._submit(request, count)
                    turns = [device.advance() for device in self._devices]  # each gets one
                    moved |= any(turns)
                    if any(device.failed for device in self._devices):
                        self._board.abandon()
                    elif not moved:
                        raise PipelineError(f"deadlock in step {request.number}: every device waits")
        except BaseException as error:
            self.closed = f"it failed: {type(error).__name__}: {error}"
            raise
        self._done += 1
        outcomes = [device.outcome for device in self._devices]
        error = failure(outcomes)
        if error is not None:
            if any(outcome.updated for outcome in outcomes):
                self.closed = f"it failed: {str(error).splitlines()[0]}"
            else:
                for device in self._devices:
                    device.link.roll_back()
            raise error
        return [loss for outcome in outcomes for loss in outcome.losses]

    def _submit(self, request: StepRequest, count: int) -> bool:
        moved, base = False, self._done * count
        for sender, where in self._inputs:
            while sender.sample < base + count and sender.ready():
                leaves = request.leaves[sender.sample - base]
                sender.put(sender.sample, *[leaves[i] for i in where])
                moved = True
        return moved

    def gradients(self) -> dict[str, torch.Tensor]:
        """See :class:`Trainer`."""
        return {name: g for device in self._devices for name, g in device.updates.latest.items()}

    def optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """See :class:`Trainer`."""
        state: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for device in self._devices:
            state.update(device.updates.state())
            groups.update(device.updates.groups())
        return state, groups

    def load_optimizer_state(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        """See :class:`Trainer`."""
        for device in self._devices:
            device.updates.load(state, settings)

    def set(self, settings: Mapping[str, Any]) -> None:
        """See :class:`Trainer`."""
        for device in self._devices:
            device.updates.set(settings)

    def close(self) -> None:
        """See :class:`Trainer`."""
        self.closed = self.closed or "it was closed"


class _Device:
    """One device: its run and, while a step goes on, its generator and the port that waits for."""

    def __init__(self, link: StepLink, updates: DeviceUpdates, run: StepRun) -> None:
        self.link, self.updates, self._run = link, updates, run
        self.port: Any = None
        self.outcome = Outcome()
        self._steps: Any = None

    @property
    def failed(self) -> bool:
        """Whether it has given up its part of the step under way."""
        return self._run.failed

    def begin(self, request: StepRequest, done: int) -> None:
        """Run up to the first wait; ``done`` steps went through these rings before."""
        self.link.number = request.number
        self.updates.begin(request.update, request.clip)
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
            self.port = go_on()
        except StopIteration as end:
            self.port, self.outcome = None, end.value


__all__ = ["InlineTrainer", "Trainer"]
