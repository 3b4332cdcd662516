"""Every sample from being offered to being over, and the account of all of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

from pipecompile.ir.sample import Counts

if TYPE_CHECKING:
    from pipecompile.streams.ticket import Ticket

End = Literal["delivered", "dropped", "failed"]


class Entry:
    """One sample on its way. Whoever moves it owns it; only the ledger decides that it is over."""

    __slots__ = ("due", "entered", "error", "leaves", "number", "offered", "pts", "sequence", "ticket", "value")

    def __init__(self, sequence: int, pts: float | None, offered: float) -> None:
        self.sequence, self.pts, self.offered = sequence, pts, offered
        self.due = float("inf")
        """When it must have entered, or else is dropped."""
        self.leaves: list[Any] | None = None
        """Its tensors, until the executor has copied them."""
        self.number = -1
        """The executor's number for it, once inside."""
        self.entered = 0.0
        self.value: Any = None
        self.error: Exception | None = None
        self.ticket: Ticket | None = None


class Ledger:
    """The account of a pipeline. Any thread may book and look; each look is of one moment."""

    def __init__(self) -> None:
        # Re-entrant: a collection of garbage within may end a stream, which books here.
        self._lock = threading.RLock()
        self._open: set[Entry] = set()
        self._submitted = self._delivered = self._dropped = self._failed = 0

    def open(self, entry: Entry) -> None:
        """A sample has been handed over."""
        with self._lock:
            self._submitted += 1
            self._open.add(entry)

    def close(self, entry: Entry, end: End) -> None:
        """It is over.

        Raises:
            KeyError: if it was over before.
        """
        with self._lock:
            self._open.remove(entry)
            if end == "delivered":
                self._delivered += 1
            elif end == "dropped":
                self._dropped += 1
            else:
                self._failed += 1

    def counts(self) -> Counts:
        """The account now."""
        with self._lock:
            return Counts(self._submitted, self._delivered, self._dropped, self._failed, len(self._open))
