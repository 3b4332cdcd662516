"""The clock of the simulator: actors are generators that say what they wait for.

An actor yields a :class:`Moment` (resume me when it has come), a :class:`Busy` (resume me after
that much time on that core) or a number (resume me at that time). What happens at the same time
happens in the order in which it was decided, so that a run can be repeated exactly.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Hashable
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True)
class Busy:
    """``seconds`` of work on ``core``, which does one thing at a time, first come first served."""

    core: Hashable
    seconds: float


@dataclass(eq=False)
class Moment:
    """Something that comes at a ``time`` (seconds) that is not known at first."""

    what: str
    time: float | None = None
    waiting: list[Actor] = field(default_factory=list["Actor"])


#: An actor is resumed with the time at which its wait was over or its work began.
Actor = Generator[Moment | Busy | float, float, None]


class Engine:
    """Runs actors until none of them can go on. ``now`` is the time in seconds from the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Actor, float | None]] = []
        self._order = count()
        self._free: dict[Hashable, float] = {}
        self._blocked: dict[int, Moment] = {}

    def run(self, *actors: Actor) -> list[str]:
        """Run to the end; returns what the actors that never ended wait for."""
        for actor in actors:
            self._later(0.0, actor, None)
        while self._queue:
            self.now, _, actor, value = heapq.heappop(self._queue)
            self._blocked.pop(id(actor), None)
            self._resume(actor, value)
        return [moment.what for moment in self._blocked.values()]

    def fire(self, moment: Moment, time: float | None = None) -> None:
        """Let the moment come at ``time`` (not in the past); now if None."""
        moment.time = self.now if time is None else time
        for actor in moment.waiting:
            self._later(moment.time, actor, moment.time)
        moment.waiting.clear()

    def _resume(self, actor: Actor, value: float | None) -> None:
        """Go on with one actor for as long as it need not wait. ``value`` is None to begin it."""
        while True:
            try:
                wanted = next(actor) if value is None else actor.send(value)
            except StopIteration:
                return
            if isinstance(wanted, Busy):
                start = max(self.now, self._free.get(wanted.core, 0.0))
                self._free[wanted.core] = start + wanted.seconds
                return self._later(start + wanted.seconds, actor, start)
            if isinstance(wanted, Moment):
                if wanted.time is None:
                    wanted.waiting.append(actor)
                    self._blocked[id(actor)] = wanted
                    return None
                wanted = wanted.time
            if wanted > self.now:
                return self._later(wanted, actor, wanted)
            value = self.now

    def _later(self, time: float, actor: Actor, value: float | None) -> None:
        heapq.heappush(self._queue, (time, next(self._order), actor, value))


__all__ = ["Actor", "Busy", "Engine", "Moment"]
