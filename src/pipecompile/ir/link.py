"""What a generated device module asks of the runtime that drives it.

``run(link, start)`` of a device module is a generator; ``start`` is the first sample, and only at the
very first of the device does it warm up: the runtime begins anew with the next one when a sample
has raised. Each ``yield port`` hands control to whoever drives it until the port is ready: a worker process blocks,
the inline executor runs another device meanwhile. ``yield receiver`` gives back the values of the
next message, or ``None`` when the stream has ended; ``yield sender`` gives back ``None`` once the
receiver has posted a slot.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import torch


class Port(Protocol):
    """Something a device can wait for."""

    def ready(self) -> bool:
        """Whether :meth:`take` would return at once."""
        ...

    def take(self) -> Any:
        """What the waiting generator is resumed with. Blocks until ready."""
        ...


class Receiver(Port, Protocol):
    """The receiving end of an edge."""

    def post(self, sample: int) -> None:
        """Offer the sender a slot for message ``sample``. Never blocks."""
        ...


class Sender(Port, Protocol):
    """The sending end of an edge."""

    def put(self, sample: int, *values: Any) -> None:
        """Copy the values into the slot of message ``sample`` and signal the receiver."""
        ...

    def end(self) -> None:
        """Tell the receiver that no message follows the last one put. Never blocks."""
        ...


class LinkProtocol(Protocol):
    """Everything a device module may use."""

    def state(self) -> tuple[torch.Tensor, ...]:
        """The device's parameters, buffers and constants."""
        ...

    def receiver(self, edge: str) -> Receiver:
        """The receiving end of the named edge."""
        ...

    def sender(self, edge: str) -> Sender:
        """The sending end of the named edge."""
        ...


Run = Generator[Port, Any, None]
