"""CUDA: lanes are streams, marks are events."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from pipecompile.errors import InputError, PipelineError
from pipecompile.ir.package import Package
from pipecompile.runtime.card_lanes import CardLanes


class CudaLane:
    """Implements :class:`pipecompile.runtime.lanes.Lane` by a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def use(self) -> AbstractContextManager[Any]:
        """See ``Lane``."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        """See ``Lane``: an event, with its time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See ``Lane``."""
        self._stream.wait_event(mark)

    def keep(self, tensor: torch.Tensor) -> None:
        """See ``Lane``: the allocator of the card is told. That of pinned memory sees copies itself."""
        if tensor.is_cuda:
            tensor.record_stream(self._stream)

    def finish(self) -> None:
        """See ``Lane``."""
        self._stream.synchronize()


class CudaCard:
    """Implements :class:`pipecompile.runtime.card_lanes.Card` by a CUDA device.

    Torch hands out streams from a pool of 32: of more lanes some are the same stream, which orders more than is
    needed and can make nobody wait for ever, because all that is waited for was handed over before.
    """

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        self.name, self.cards = name, [self._device.index]

    def lane(self) -> CudaLane:
        """See ``Card``."""
        return CudaLane(torch.cuda.Stream(self._device))

    def caller(self) -> CudaLane:
        """See ``Card``."""
        return CudaLane(torch.cuda.current_stream(self._device))

    def memory(self, nbytes: int) -> torch.Tensor:
        """See ``Card``. What was there before must be over, whatever stream it was on."""
        memory = torch.from_dlpack(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        if memory.untyped_storage().resizable():  # code that keeps a copy of what lies in a slot would not know it
            raise PipelineError(f"torch {torch.__version__} gives no memory of fixed size on {self.name}")
        torch.cuda.synchronize(self._device)
        return memory

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Card``: on the card already, or pinned, so that the copy is the card's own work."""
        return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Card``."""
        return self.near(tensor).to(self._device, non_blocking=True)

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See ``Card``."""
        return start.elapsed_time(end) / 1e3


def lanes_of(package: Package, tensors: Mapping[str, torch.Tensor]) -> CardLanes | None:
    """The lanes of a pipeline on a card with these weights; None on CPU cores.

    Raises:
        InputError: naming a weight that lies elsewhere, and its stage.
    """
    card = package.plan.cluster.card
    if card is None:
        return None
    names = {entry.name: entry.fqn for entry in package.state if entry.kind != "constant"}  # these may be numbers
    for module in package.modules:
        for name in module.state:
            if name in names and str(tensors[name].device) != card:
                stages = " and ".join(map(str, module.stages))
                raise InputError(
                    f"{names[name]!r} of stage {stages} is on {tensors[name].device}, the stage runs on {card}: the "
                    f"model was moved since it was compiled; move it back with .to({card!r})"
                )
    return CardLanes(CudaCard(card))


__all__ = ["CudaCard", "CudaLane", "lanes_of"]
