"""Simple ways to cut a model, to hold the planner against. All cut one topological order of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from pipecompile.passes.partition import Placement, Problem, judge


def equal_count(costs: Sequence[float], blocks: int) -> list[int]:
    """Sizes of blocks with as many layers each."""
    return [len(costs) * (b + 1) // blocks - len(costs) * b // blocks for b in range(blocks)]


def equal_cost(costs: Sequence[float], blocks: int) -> list[int]:
    """Sizes of blocks that end where the running sum is closest to its even share."""
    sums, total = list(accumulate(costs)), sum(costs)
    ends = [0]
    for block in range(1, blocks):
        low, high = ends[-1] + 1, len(costs) - (blocks - block)
        ends.append(min(range(low, high + 1), key=lambda end: abs(sums[end - 1] - total * block / blocks)))
    ends.append(len(costs))
    return [high - low for low, high in pairwise(ends)]


def greedy(costs: Sequence[float], blocks: int) -> list[int]:
    """Sizes of blocks filled one after the other until the next layer would exceed an even share of the rest."""
    sizes, at, left = list[int](), 0, sum(costs)
    for block in range(blocks - 1):
        share, size, held = left / (blocks - block), 0, 0.0
        room = len(costs) - at - (blocks - block - 1)
        while size < room and (size == 0 or held + costs[at + size] <= share):
            held += costs[at + size]
            size += 1
        sizes.append(size)
        at, left = at + size, left - held
    return [*sizes, len(costs) - at]


def block_partition(costs: Sequence[float], blocks: int) -> list[int]:
    """Sizes of blocks by the local search PARTIME balances with (block partitions of sequences, arXiv 1308.2452).

    Costs are scaled to 0 .. 1 by their minimum and maximum. From equal counts, layers move from the
    largest block towards the smallest, one across each border between them, until the largest
    exceeds the smallest by at most 1, or a partition comes back.
    """
    low, high = min(costs), max(costs)
    scaled = [(cost - low) / (high - low) if high > low else 1.0 for cost in costs]
    ends = [0, *accumulate(equal_count(costs, blocks))]
    seen: set[tuple[int, ...]] = set()
    while tuple(ends) not in seen:
        seen.add(tuple(ends))
        sums = [sum(scaled[a:b]) for a, b in pairwise(ends)]
        largest, smallest = max(range(blocks), key=sums.__getitem__), min(range(blocks), key=sums.__getitem__)
        if sums[largest] <= sums[smallest] + 1:
            break
        moved = list(ends)
        if largest > smallest:
            # The largest gives its first layer to the left; each block between passes one on.
            for border in range(smallest + 1, largest + 1):
                moved[border] += 1
        else:
            for border in range(largest + 1, smallest + 1):
                moved[border] -= 1
        if any(b <= a for a, b in pairwise(moved)):
            break
        ends = moved
    return [b - a for a, b in pairwise(ends)]


#: By the name in the tables.
BASELINES: dict[str, Callable[[Sequence[float], int], list[int]]] = {
    "equal count": equal_count,
    "equal cost": equal_cost,
    "greedy": greedy,
    "PARTIME": block_partition,
}


def cut(problem: Problem, method: Callable[[Sequence[float], int], list[int]], devices: int) -> float:
    """Largest load of the method's cut of the layers in their order, memory limits not asked."""
    sizes = method(problem.cost, devices)
    stage_of = tuple(stage for stage, size in enumerate(sizes) for _ in range(size))
    return judge(problem, Placement(stage_of, tuple((d,) for d in range(devices)))).slowest


__all__ = ["BASELINES", "block_partition", "cut", "equal_cost", "equal_count", "greedy"]
