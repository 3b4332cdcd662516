"""An alarm counts when it is seen twice: whoever looks may have slept as long as those it looks at."""

from __future__ import annotations

from collections.abc import Iterable

from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.records import Records, Wait

#: Seconds that must lie between the two looks.
_APART = 0.3


class SecondLook:
    """Confirms that devices stand still.

    Where all processes were stopped for a while (a suspended container, SIGSTOP) the clock has gone
    on, and the first to run again finds everybody late. A moment later the others have moved.
    """

    def __init__(self) -> None:
        self._seen: tuple[Wait | None, ...] = ()
        self._at = 0.0

    def confirms(self, records: Iterable[Records]) -> bool:
        """Whether nothing has moved since the first look, that being long enough ago."""
        seen, now = tuple(each.last() for each in records), clock()
        if seen != self._seen:
            self._seen, self._at = seen, now
        return now - self._at >= _APART


__all__ = ["SecondLook"]
