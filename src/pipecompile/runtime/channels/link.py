"""The ``link`` a device module gets: its state and its ports by edge name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipecompile.errors import ProgramError
from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender


@dataclass(frozen=True)
class PortInfo:
    """What a recorded port number means. ``stage`` is the one on this device."""

    edge: Edge
    receives: bool

    @property
    def stage(self) -> int:
        """The stage that waits at this port."""
        return self.edge.target if self.receives else self.edge.source

    def __str__(self) -> str:
        return f"{'a message' if self.receives else 'a free slot'} on edge {self.edge.name}"


def ports_of(edges: Sequence[Edge], stages: Sequence[int], replica: int = 0) -> tuple[PortInfo, ...]:
    """The ports of a device in the order both the worker and the parent number them."""

    def here(edge: Edge, receives: bool) -> bool:
        if receives:
            return edge.target in stages and edge.target_replica == replica
        return edge.source in stages and edge.source_replica == replica

    return tuple(PortInfo(edge, receives) for edge in edges for receives in (True, False) if here(edge, receives))


class DeviceLink:
    """Implements :class:`pipecompile.ir.link.LinkProtocol`."""

    def __init__(self, state: tuple[torch.Tensor, ...], ports: Sequence[RingReceiver | RingSender]) -> None:
        self._state = state
        self._receivers = {port.edge: port for port in ports if isinstance(port, RingReceiver)}
        self._senders = {port.edge: port for port in ports if isinstance(port, RingSender)}

    def state(self) -> tuple[torch.Tensor, ...]:
        """The device's parameters, buffers and constants."""
        return self._state

    def receiver(self, edge: str) -> RingReceiver:
        """The receiving end of the named edge.

        Raises:
            ProgramError: if that edge does not end on this device.
        """
        if edge not in self._receivers:
            raise ProgramError(f"no edge {edge!r} ends on this device (there are {sorted(self._receivers)})")
        return self._receivers[edge]

    def sender(self, edge: str) -> RingSender:
        """The sending end of the named edge.

        Raises:
            ProgramError: if that edge does not start on this device.
        """
        if edge not in self._senders:
            raise ProgramError(f"no edge {edge!r} starts on this device (there are {sorted(self._senders)})")
        return self._senders[edge]
