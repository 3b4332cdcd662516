"""Admission: who may wait at the entrance of a pipeline, and who is turned away when it is full.

Nothing beyond the entrance is ever dropped. This file knows neither threads nor clocks, so that
each policy can be compared with a simulation of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

from pipecompile.errors import InputError
from pipecompile.streams.ledger import Entry

Overload = Literal["block", "drop_oldest", "drop_newest", "latest", "error"]
OnError = Literal["raise", "skip", "return"]

#: Samples that may wait at the entrance unless ``max_in_flight`` says otherwise.
WAITING = 8


@dataclass(frozen=True)
class Options:
    """How a stream treats a source that is too fast, and samples that fail.

    Args:
        on_overload: what happens to a sample that finds the entrance full: its source waits
            (``block``), the one waiting longest goes (``drop_oldest``), it goes itself
            (``drop_newest``), all that wait go (``latest``), or its source gets
            :class:`~pipecompile.errors.Overloaded` (``error``).
        max_in_flight: how many samples may be inside the pipeline, and how many may wait before
            it. None: as many as its rings hold, and 8; for ``latest`` one a device, and 1.
        deadline: seconds after being offered within which a sample must have entered, else it is
            dropped.
        on_error: what the consumer gets for a sample that failed: its exception is raised (the
            stream can be read on), skipped, or returned in place of a result.
        records: hand out :class:`~pipecompile.ir.sample.Result` in place of bare values.

    Raises:
        InputError: for a value that makes no sense.
    """

    on_overload: Overload = "block"
    max_in_flight: int | None = None
    deadline: float | None = None
    on_error: OnError = "raise"
    records: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("on_overload", self.on_overload, get_args(Overload)),
            ("on_error", self.on_error, get_args(OnError)),
        ):
            if value not in choices:
                raise InputError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}")
        if self.max_in_flight is not None and not isinstance(self.max_in_flight, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"max_in_flight={self.max_in_flight!r}: it is a whole number of samples")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InputError(f"max_in_flight={self.max_in_flight}: at least one sample must fit in")
        if self.deadline is not None and not (isinstance(self.deadline, (int, float)) and self.deadline >= 0.0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"deadline={self.deadline!r}: it is seconds from being offered, 0 or more")

    def inside(self, devices: int) -> int:
        """How many samples may be inside a pipeline of that many devices.

        For ``latest`` one a device: a sample then waits nowhere longer than the slowest stage
        takes, so that its age at delivery is at most about stages times that (Little's law).
        """
        if self.max_in_flight is not None:
            return self.max_in_flight
        return devices if self.on_overload == "latest" else 1 << 60

    @property
    def waiting(self) -> int:
        """How many samples may wait at the entrance."""
        return 1 if self.on_overload == "latest" else self.max_in_flight or WAITING


class Entrance:
    """Samples that wait to enter, in order."""

    def __init__(self, policy: Overload, capacity: int) -> None:
        self._policy, self._capacity = policy, capacity
        self._waiting: deque[Entry] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether one more would be too many."""
        return len(self._waiting) >= self._capacity

    @property
    def refuses(self) -> bool:
        """Whether a sample offered now would have to wait outside (``block``) or be refused (``error``)."""
        return self.full and self._policy in ("block", "error")

    def offer(self, entry: Entry) -> list[Entry]:
        """Let a sample in; returns those turned away for it, perhaps itself."""
        if not self.full:
            self._waiting.append(entry)
            return []
        if self._policy == "drop_newest":
            return [entry]
        assert not self.refuses
        # For the policy ``latest`` the capacity is one.
        gone = [self._waiting.popleft()]
        self._waiting.append(entry)
        return gone

    def first(self) -> Entry | None:
        """Who enters next."""
        return self._waiting[0] if self._waiting else None

    def pop(self) -> None:
        """The first has entered."""
        self._waiting.popleft()

    def expired(self, now: float) -> list[Entry]:
        """Remove those whose deadline has passed."""
        late = [entry for entry in self._waiting if entry.due < now]
        if late:
            self._waiting = deque(entry for entry in self._waiting if not entry.due < now)
        return late

    def next_due(self) -> float:
        """The earliest deadline among those who wait."""
        return min((entry.due for entry in self._waiting), default=float("inf"))

    def clear(self) -> list[Entry]:
        """Turn everybody away."""
        gone, self._waiting = list(self._waiting), deque()
        return gone
