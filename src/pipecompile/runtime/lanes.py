"""Lanes: where the work of a device is done, in the order it is given, while the host goes on.

A lane is a stream of a CUDA card. The engine of a training step runs every device in turn in one thread; with lanes,
its turn only hands work over, and what waits for what is said by marks: a point in one lane that another waits for.
The host itself waits once, at the end of a step. On the CPU there are no lanes: work is done when its turn is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.local import LocalEdge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, clock

#: A point in a lane, after all work given to it before. What it is only the lanes know.
Mark = Any


class Lane(Protocol):
    """A queue of work. The host goes on; what waits are lanes."""

    def use(self) -> AbstractContextManager[Any]:
        """What is computed inside is given to this lane."""
        ...

    def finish(self) -> None:
        """The exception to the rule: the host waits until all is done."""
        ...

    def mark(self) -> Mark:
        """The point reached when all work given so far is done."""
        ...

    def wait(self, mark: Mark) -> None:
        """What is given from now on begins after ``mark``."""
        ...

    def keep(self, tensor: torch.Tensor) -> None:
        """Do not use the tensor's memory again before the work given so far is done, even if nobody holds it."""
        ...


class EdgeEnds(Protocol):
    """Both ends of an edge within one process."""

    def sender(self, index: int = 0) -> RingSender:
        """The sending end."""
        ...

    def receiver(self, index: int = 0) -> RingReceiver:
        """The receiving end."""
        ...


class Lanes(Protocol):
    """The lanes of one step: one a device, and one for the copies of each edge."""

    @property
    def cards(self) -> Sequence[int]:
        """The cards whose random state a step uses."""
        ...

    def begin(self) -> None:
        """All lanes wait for what the caller has given the card before."""
        ...

    def finish(self) -> None:
        """The host waits until all lanes are done.

        Raises:
            StepError: if the card reports that something failed on it.
        """
        ...

    def of(self, device: int) -> AbstractContextManager[Any]:
        """What is computed inside is given to the lane of a device."""
        ...

    def edge(self, edge: Edge, sizes: Mapping[str, int], source: int | None, target: int | None) -> EdgeEnds:
        """An edge from one device to another; None is the caller. ``sizes`` bound its dynamic sizes.

        Raises:
            PipelineError: if the card has no memory left for it.
        """
        ...

    def here(self, nest: Any) -> Any:
        """Targets of a step, in any nest, where lanes can read them that :meth:`begin` after it.

        Raises:
            StepError: if the card has no memory left for them.
        """
        ...

    def now(self, device: int) -> Any:
        """The time on a device, known only after :meth:`finish`: see :meth:`seconds`."""
        ...

    def seconds(self, moment: Any) -> float:
        """A moment of :meth:`now` in seconds, from any one time on."""
        ...


class HostLanes:
    """No lanes: the host computes."""

    cards: Sequence[int] = ()

    def begin(self) -> None:
        """Nothing to wait for."""

    def finish(self) -> None:
        """All is done."""

    def of(self, device: int) -> AbstractContextManager[Any]:
        """The host."""
        return nullcontext()

    def edge(self, edge: Edge, sizes: Mapping[str, int], source: int | None, target: int | None) -> EdgeEnds:
        """See ``Lanes``."""
        return LocalEdge(edge, sizes)

    def here(self, nest: Any) -> Any:
        """They are here."""
        return nest

    def now(self, device: int) -> float:
        """The clock."""
        return clock()

    def seconds(self, moment: float) -> float:
        """As it is."""
        return moment


def remark(error: BaseException) -> str:
    """What else there is to say of an error of a stage that only a card makes, or nothing."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            ". The devices of a pipeline share the memory of their card: more micro_batches=, recompute='stage' or "
            "schedule='1f1b' need less of it"
        )
    if isinstance(error, torch.AcceleratorError):
        return (
            ". The card reports such an error after the fact: it may be of an earlier layer, or of another stage than "
            "the one that noticed. CUDA_LAUNCH_BLOCKING=1 in the environment, set before torch starts, names the right "
            "one. This process cannot use the card any more"
        )
    return ""


__all__ = ["EdgeEnds", "HostLanes", "Lane", "Lanes", "Mark", "remark"]
