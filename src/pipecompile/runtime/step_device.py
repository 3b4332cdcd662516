"""One device of a training pipeline inside its worker process."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipecompile.ir.cluster import Link
from pipecompile.ir.deal import Deal
from pipecompile.ir.link import Port
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import Edge
from pipecompile.ir.tree import Tree
from pipecompile.runtime import numerics, pickled
from pipecompile.runtime.arena import open_state
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import RingLayout, RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, attach
from pipecompile.runtime.records import Records
from pipecompile.runtime.step import StepLink, step_error
from pipecompile.runtime.step_run import Outcome, StepRun
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import DeviceUpdates, Handover


@dataclass(frozen=True)
class Boot:
    """All a worker needs to know. Descriptors are open in the worker under the same numbers."""

    module: DeviceModule
    edges: tuple[Edge, ...]
    fds: dict[str, tuple[int, int, int]]
    sizes: dict[str, int]
    throttle: dict[str, Link]
    records: int
    arenas: tuple[int, ...]
    state: list[dict[str, Any]]
    owned: dict[int, tuple[str, ...]]
    training: Training
    out_tree: Tree
    gradients: list[dict[str, Any]]
    micro_batches: int
    deal: Deal
    written: tuple[str, ...]
    threads: int
    numerics: dict[str, Any]
    imports: tuple[str, ...]

    def device(self, commands: socket.socket) -> StepDevice:
        """What runs in the worker."""
        return StepDevice(self, commands)


class StepDevice:
    """Answers the commands of the trainer; see :class:`pipecompile.runtime.process_step.ProcessTrainer`."""

    def __init__(self, boot: Boot, commands: socket.socket) -> None:
        torch.set_num_threads(boot.threads)
        torch.set_num_interop_threads(1)
        torch.backends.mha.set_fastpath_enabled(False)
        numerics.restore(boot.numerics)
        torch.set_grad_enabled(False)  # the stages enable it where they record
        for name in boot.imports:
            importlib.import_module(name)
        self._boot, self._module = boot, boot.module
        found = open_state(boot.arenas, [*boot.state, *boot.gradients])
        tensors = dict(zip(boot.module.state, found, strict=False))
        owned = [name for names in boot.owned.values() for name in names]
        places = dict(zip(owned, found[len(boot.state) :], strict=True)) if boot.gradients else None
        ports = list[RingReceiver | RingSender]()
        for index, port in enumerate(ports_of(boot.edges, boot.module.stages)):
            shared = SharedEdge(RingLayout.of(port.edge, boot.sizes), *boot.fds[port.edge.name])
            throttle = boot.throttle.get(port.edge.name)
            ports.append(shared.receiver(index, throttle) if port.receives else shared.sender(index))
        self._records = Records(attach(boot.records), len(ports) + 1)
        board = _SocketBoard(commands, len(ports))
        self._updates = boot.training.updates(boot.module.device, boot.owned, tensors, board, places)
        self._link = StepLink(tensors, ports, self._updates, boot.training.seed, boot.written)
        self._criterion = boot.training.criterion(boot.out_tree)
        self._link.criterion = self._criterion
        self._begun = self._ended = 0.0
        self._run = StepRun(boot.module, self._link, ports, boot.micro_batches, boot.deal)
        for fd in (*boot.arenas, boot.records, *(fds[0] for fds in boot.fds.values())):
            os.close(fd)

    def answer(self, message: tuple[Any, ...]) -> tuple[Any, ...]:
        """Carry out one command; what goes wrong is part of the answer."""
        kind, *arguments = message
        try:
            return ("done", getattr(self, f"_do_{kind}")(*arguments))
        except Exception as error:
            module = self._module
            return ("error", str(step_error(error, module.filename, module.device, module.stages)))

    def _do_step(
        self, done: int, number: int, update: bool, clip: float | None, targets: Any, weights: list[float]
    ) -> Outcome:
        self._link.number, self._link.parts, self._begun = number, len(weights), clock()
        if isinstance(self._updates, DeviceUpdates):
            self._updates.begin(update, clip)
        else:
            self._updates.begin()
        if self._criterion is not None:
            self._criterion.targets = pickled.unpacked(targets)
            self._criterion.weights = weights
        outcome = self._drive(self._run.run(done))
        self._ended = clock()
        losses = [(x.item(), str(x.dtype).removeprefix("torch.")) for x in outcome.losses]
        return replace(outcome, losses=losses, given=tuple(self._updates.latest) if self._handed_over else ())

    @property
    def _handed_over(self) -> bool:
        return isinstance(self._updates, Handover)

    @property
    def _optimizers(self) -> DeviceUpdates:
        assert isinstance(self._updates, DeviceUpdates), "the caller has the optimizer"
        return self._updates

    def _do_roll_back(self) -> None:
        self._link.roll_back()

    def _drive(self, steps: Generator[Any, Any, Outcome]) -> Outcome:
        records = self._records
        count, log, capacity, resume = records.count, records.log, records.capacity, steps.send
        number = int(count[0])
        try:
            port = next(steps)
            while True:
                at = (number % capacity) * 4
                number += 1
                log[at], log[at + 1], log[at + 3] = port.index, port.sample, 0.0
                log[at + 2] = clock()
                count[0] = number
                try:
                    value = port.take()
                except Exception as error:  # the run says what follows from it
                    log[at + 3] = clock()
                    port = steps.throw(error)
                    continue
                log[at + 3] = clock()
                port = resume(value)
        except StopIteration as end:
            return end.value

    def _do_spans(self) -> Any:
        waits = [wait for wait in self._records.all() if wait.begin >= self._begun]
        return list(self._link.spans.spans), waits, self._ended

    def _do_gradients(self) -> Any:
        return pickled.packed(self._updates.latest)

    def _do_state(self) -> Any:
        return pickled.packed(self._optimizers.state()), self._optimizers.groups()

    def _do_load(self, state: Any, settings: list[dict[str, Any]]) -> None:
        self._optimizers.load(pickled.unpacked(state), settings)

    def _do_set(self, settings: dict[str, Any], group: int | None) -> None:
        self._optimizers.set(settings, group)


class _SocketBoard:
    """A board whose sums are made by the trainer: one message there, one back."""

    def __init__(self, commands: socket.socket, index: int) -> None:
        self._commands, self.index, self.sample = commands, index, 0

    def offer(self, device: int, squares: float) -> Port:
        """See ``Board``."""
        pickled.send(self._commands, ("norm", squares))
        return self

    def ready(self) -> bool:
        """Nobody asks: a worker blocks in :meth:`take`."""
        return False

    def take(self) -> float:
        """The sum over all devices, from the trainer; it has none if one of them failed."""
        kind, total = pickled.receive(self._commands)
        assert kind == "norm"
        if total is None:
            raise SampleFailed(-1)
        return float(total)


__all__ = ["Boot", "StepDevice"]
