"""When a streamed pipeline finishes each sample, as plain recurrences over max and +.

Nothing here knows of programs, instructions or a clock: each time is defined by earlier ones. All
devices have a core of their own, the caller costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

#: (source, target, ahead); -1 is the caller on either side.
Ends = tuple[int, int, int]


def finishes(
    compute: Sequence[float],
    edges: Sequence[Ends],
    samples: int,
    *,
    receive: float = 0.0,
    send: Mapping[tuple[int, int], float] | None = None,
    transfer: Mapping[tuple[int, int], float] | None = None,
) -> list[float]:
    """Seconds at which the caller has each sample, submitting all of them as fast as it can.

    ``receive`` is paid for each message by its reader, ``send`` by its writer, ``transfer`` by nobody
    but the message, one at a time an edge. A stage sends in the order of ``edges``.
    """
    ahead = {(s, t): a for s, t, a in edges}
    into = {t: [e for e in ahead if e[1] == t] for t in range(-1, len(compute))}
    out = {s: [e for e in ahead if e[0] == s] for s in range(-1, len(compute))}
    cost, travel = send or {}, transfer or {}

    @cache
    def turn(stage: int, n: int) -> float:
        """Stage begins its turn ``n``: all of turn ``n - 1`` has been sent."""
        if n <= 0:
            return 0.0
        return sent(out[stage][-1], n - 1) if out[stage] else computed(stage, n - 1)

    @cache
    def posted(edge: tuple[int, int], n: int) -> float:
        """The reader offers room for message ``n`` at the start of turn ``n - ahead``."""
        begin = n - ahead[edge]
        if edge[1] == -1:
            return done(begin - 1)
        return turn(edge[1], begin)

    @cache
    def sent(edge: tuple[int, int], n: int) -> float:
        source = edge[0]
        if source == -1:
            return submitted(n)
        order = out[source]
        before = order.index(edge)
        free = sent(order[before - 1], n) if before else computed(source, n)
        return max(free, posted(edge, n)) + cost.get(edge, 0.0)

    @cache
    def here(edge: tuple[int, int], n: int) -> float:
        if edge not in travel:
            return sent(edge, n)
        previous = here(edge, n - 1) if n else 0.0
        return max(sent(edge, n), posted(edge, n), previous) + travel[edge]

    @cache
    def computed(stage: int, n: int) -> float:
        time = turn(stage, n)
        for edge in into[stage]:
            time = max(time, here(edge, n)) + receive
        return time + compute[stage]

    @cache
    def submitted(n: int) -> float:
        previous = submitted(n - 1) if n else 0.0
        return max([previous, *(posted(edge, n) for edge in out[-1])])

    @cache
    def done(n: int) -> float:
        return 0.0 if n < 0 else max([done(n - 1), *(here(edge, n) for edge in into[-1])])

    return [done(n) for n in range(samples)]
