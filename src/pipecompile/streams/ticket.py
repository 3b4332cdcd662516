"""What ``submit`` gives back: a future that also says which sample it stands for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Literal

from pipecompile.ir.sample import Record

State = Literal["pending", "delivered", "dropped", "failed"]


class Ticket(Future[Any]):
    """The result of one submitted sample, now or later; a :class:`concurrent.futures.Future`.

    ``result(timeout)`` gives the result; it raises :class:`~pipecompile.errors.SampleDropped` if
    the sample was turned away, the sample's own error if it failed, ``TimeoutError`` after
    ``timeout`` seconds. Callbacks run in the pipeline's thread, in the order of the samples.
    ``await asyncio.wrap_future(ticket)`` works. A ticket cannot be cancelled: nothing inside a
    pipeline is dropped.

    Attributes:
        sequence: number of the sample among those submitted, dropped ones included.
        pts: the time stamp it was submitted with.
        state: ``pending``, ``delivered``, ``dropped`` or ``failed``.
        record: what happened to it, once delivered.
    """

    def __init__(self, sequence: int, pts: float | None) -> None:
        super().__init__()
        self.sequence, self.pts = sequence, pts
        self.state: State = "pending"
        self.record: Record | None = None
        self.set_running_or_notify_cancel()
