"""The caller's side of a training step: inputs handed over, and for autograd results taken and gradients sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipecompile.ir.package import Package
from pipecompile.ir.program import HOST, Edge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed
from pipecompile.runtime.step_run import drain


class HostPorts:
    """All ports of the caller. ``results`` holds, per micro-batch, values by name as they come in."""

    def __init__(
        self,
        package: Package,
        sender: Callable[[Edge], RingSender],
        receiver: Callable[[Edge], RingReceiver],
    ) -> None:
        position = {name: i for i, name in enumerate(package.input_names)}
        program = package.program
        edges = [edge for edge in program.edges if HOST in (edge.source, edge.target)]
        self._count = program.micro_batches
        inputs = [(e, sender(e)) for e in edges if e.source == HOST and not e.kind]
        self._inputs = [(port, tuple(position[v] for v in e.values)) for e, port in inputs]
        self._results = [(receiver(e), e.values) for e in edges if e.target == HOST]
        self._gradients = [(sender(e), e.values) for e in edges if e.kind == "gradient"]
        self._deals = {e.name: program.deal(max(e.source, e.target)) for e in edges}
        self._ends: dict[str, int] = {}
        self.results: list[dict[str, Any]] = []
        self.failed = False
        self._leaves: Sequence[Sequence[Any]] = ()
        self._given: Sequence[dict[str, torch.Tensor]] = ()
        self._base = 0

    @property
    def complete(self) -> bool:
        """Whether every result of the step under way is there."""
        return not any(self._more(port) for port, _ in self._results)

    def waits(self) -> list[str]:
        """The edges on which something may come that :meth:`move` carries."""
        ports = [port for port, _ in (*self._inputs, *self._results, *(self._gradients if self._given else ()))]
        return [port.edge for port in ports if self._more(port)]

    def begin(self, done: int, leaves: Sequence[Sequence[Any]]) -> None:
        """Start a step of these inputs per micro-batch, or of fewer; ``done`` steps went through these rings before."""
        self._base = done * self._count
        self._ends = {edge: self._base + deal.count(len(leaves)) for edge, deal in self._deals.items()}
        self._leaves, self._given, self.failed = leaves, (), False
        self.results = [{} for _ in leaves]
        for port, _ in (*self._inputs, *self._results, *self._gradients):
            port.go_on(self._base)
        for port, _ in self._results:
            port.post_until(self._ends[port.edge])

    def _more(self, port: RingSender | RingReceiver) -> bool:
        """Whether a port has messages of this step before it."""
        return port.sample < self._ends[port.edge]

    def _number(self, port: RingSender | RingReceiver) -> int:
        """The step's number of the micro-batch whose message comes next."""
        return self._deals[port.edge].number(port.sample - self._base)

    def answer(self, gradients: Sequence[dict[str, torch.Tensor]]) -> None:
        """The gradients of the results, per micro-batch by name."""
        self._given = gradients

    def move(self) -> bool:
        """Carry what can be carried now; whether there was anything."""
        moved = False
        if self.failed:
            return False
        try:
            for sender, where in self._inputs:
                while self._more(sender) and sender.ready():
                    leaves = self._leaves[self._number(sender)]
                    sender.put(sender.sample, *[leaves[i].detach() for i in where])
                    moved = True
            for receiver, names in self._results:
                while self._more(receiver) and receiver.ready():
                    number = self._number(receiver)
                    self.results[number].update(zip(names, receiver.own() or (), strict=True))
                    moved = True
        except SampleFailed:
            self.failed = moved = True
            return moved
        for sender, names in self._gradients if self._given else ():
            while self._more(sender) and sender.ready():
                given = self._given[self._number(sender)]
                sender.put(sender.sample, *[given[name] for name in names])
                moved = True
        return moved

    def close(self) -> None:
        """Let go of the rings' memory."""
        self._inputs, self._results, self._gradients = [], [], []

    def drain(self) -> bool:
        """Give the step under way up, as far as that goes without waiting; whether all is carried."""
        self.failed = True
        ports = [port for port, _ in (*self._inputs, *self._results, *self._gradients)]
        for _ in drain(ports, lambda port: self._ends[port.edge]):
            return False
        return True


__all__ = ["HostPorts"]
