"""A plain sequential account of what each overload policy should do; shares no code with the runtime.

The pipeline is a line of at most ``limit`` samples that finish in order; before it is a line of at
most ``room`` samples that wait. Events come one at a time: ``("arrive", None)`` or ``("finish", None)``
or ``("pass", seconds)``.
"""

from __future__ import annotations

from collections.abc import Sequence


def simulate_policy(
    policy: str, limit: int, room: int, deadline: float | None, events: Sequence[tuple[str, float]]
) -> dict[str, list[int]]:
    """Which samples were delivered, dropped and refused, in the order in which that happened, and which are left.

    ``drop_oldest`` keeps the newest ``room``; ``latest`` keeps one. Time passes only with ``pass``.
    """
    if policy == "latest":
        room = 1
    now, count = 0.0, 0
    inside: list[int] = []
    queue: list[tuple[int, float]] = []
    delivered: list[int] = []
    dropped: list[int] = []
    refused: list[int] = []

    def late() -> None:
        # Told in the order of arrival, before anybody enters.
        for number, arrived in list(queue):
            if deadline is not None and now > arrived + deadline:
                queue.remove((number, arrived))
                dropped.append(number)

    def enter() -> None:
        late()
        while queue and len(inside) < limit:
            inside.append(queue.pop(0)[0])

    for kind, seconds in events:
        if kind == "pass":
            now += seconds
        elif kind == "arrive":
            number, count = count, count + 1
            if len(queue) < room:
                queue.append((number, now))
            elif policy in ("block", "error"):
                refused.append(number)
                if policy == "error":
                    dropped.append(number)
                else:
                    count -= 1  # its source keeps it and comes again: it has no number yet
                    refused.pop()
            elif policy == "drop_newest":
                dropped.append(number)
            else:
                dropped.append(queue.pop(0)[0])
                queue.append((number, now))
        elif inside:
            delivered.append(inside.pop(0))
        enter()
    return {
        "delivered": delivered,
        "dropped": dropped,
        "refused": refused,
        "inside": inside,
        "waiting": [number for number, _ in queue],
    }
