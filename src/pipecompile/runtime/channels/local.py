"""Edges within one process, for the inline executor: the same rings and credits, signals by counting."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import torch

from pipecompile.errors import PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.ring import Ring, RingLayout, RingReceiver, RingSender


class LocalSignal:
    """A plain counter. Nobody else runs while we wait, so waiting on an empty one is an error."""

    def __init__(self, edge: str) -> None:
        self._edge, self._count = edge, 0

    def add(self) -> None:
        """Add one."""
        self._count += 1

    def read(self) -> int:
        """Empty the counter."""
        count, self._count = self._count, 0
        return count

    def wait(self) -> int:
        """Empty the counter, which must be positive."""
        if not self._count:
            raise PipelineError(f"edge {self._edge}: waited on in the process that would have to signal it")
        return self.read()


class LocalEdge:
    """Both ends of an edge. Values are copied, so that a stage never sees its sender's tensors."""

    def __init__(self, edge: Edge, sizes: Mapping[str, int], card: Callable[[int], torch.Tensor] | None = None) -> None:
        """``card`` gives so many bytes where tensors are to lie, if that is elsewhere."""
        layout = RingLayout.of(edge, sizes)
        elsewhere = None if card is None else card(layout.nbytes)
        self.ring = Ring.map(mmap.mmap(-1, max(layout.nbytes, mmap.PAGESIZE)), layout, elsewhere)
        self.signals = LocalSignal(edge.name), LocalSignal(edge.name)

    def sender(self, index: int = 0) -> RingSender:
        """The sending end."""
        return RingSender(self.ring, *self.signals, index)

    def receiver(self, index: int = 0, throttle: Link | None = None) -> RingReceiver:
        """The receiving end."""
        return RingReceiver(self.ring, *self.signals, index, throttle)
