"""Chain dynamic program: the best cut of one topological order into consecutive stages.

For an order of n layers, ``C[j, i]`` is the load of a stage holding positions i .. j-1 and
``f[s][j] = min over i of max(f[s-1][i], C[j, i])`` (O(stages n^2), exact for the order and this
cost). A second sweep takes, among cuts that reach the optimum, the one that transfers least.
The cost counts each value once however many stages read it and at most one edge per side, so it
is exact on chains and never above the true load elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.problem import HOST, Assignment, Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

#: Costs closer than this (relative) are taken as equal, so that rounding decides nothing.
TIE = 1e-9


def orders(problem: Problem) -> list[tuple[int, ...]]:
    """Distinct topological orders to try: as given, depth first, reverse depth first, Kahn's."""
    graph = problem.graph
    found = [
        tuple(range(problem.layers)),
        tuple(reversed(list(nx.dfs_postorder_nodes(graph)))),
        tuple(nx.dfs_postorder_nodes(graph.reverse())),
        tuple(nx.topological_sort(graph)),
    ]
    return list(dict.fromkeys(found))


def chain_cuts(problem: Problem, order: tuple[int, ...]) -> list[Assignment]:
    """The best assignments along ``order`` with 1, 2, ... ``problem.stages`` stages, in this order."""
    n, stages = problem.layers, problem.stages
    place = np.empty(n, dtype=np.intp)
    place[list(order)] = np.arange(n)
    transfer = _transfer(problem, place)
    alike = len(set(problem.speeds)) == 1
    shared = _segments(problem, order, 0, transfer) if alike else None

    def segments(stage: int) -> Floats:
        return shared if shared is not None else _segments(problem, order, stage, transfer)

    best, came = _sweep(n, stages, segments)
    found = [_assignment(order, _cuts(came[: s + 1], n)) for s in range(stages)]

    limit = best[-1][n] * (1 + TIE)
    masked = np.where(shared <= limit, transfer, np.inf) if shared is not None else None

    def frugal(stage: int) -> Floats:
        return masked if masked is not None else np.where(segments(stage) <= limit, transfer, np.inf)

    least, came = _sweep(n, stages, frugal, add=True)
    if np.isfinite(least[-1][n]):
        found[-1] = _assignment(order, _cuts(came, n))
    return found


def _sweep(n: int, stages: int, cost: Callable[[int], Floats], add: bool = False) -> tuple[list[Floats], list[Ints]]:
    """Forward recursion: per stage the best value of every prefix and where its last stage starts."""
    best: list[Floats] = []
    came: list[Ints] = []
    before = np.full(n + 1, np.inf)
    before[0] = 0.0
    rows = np.arange(n + 1)
    for stage in range(stages):
        whole = (np.add if add else np.maximum)(before[None, :], cost(stage))
        start = whole.argmin(axis=1)
        before = whole[rows, start]
        best.append(before)
        came.append(start)
    return best, came


def _cuts(came: list[Ints], n: int) -> list[int]:
    """Stage borders (first position of each stage, then n) by following the choices back."""
    borders = [n]
    for start in reversed(came):
        borders.append(int(start[borders[-1]]))
    return borders[::-1]


def _assignment(order: tuple[int, ...], borders: list[int]) -> Assignment:
    stage_of = [0] * len(order)
    for stage, (low, high) in enumerate(pairwise(borders)):
        for layer in order[low:high]:
            stage_of[layer] = stage
    return tuple(stage_of)


def _segments(problem: Problem, order: tuple[int, ...], stage: int, transfer: Floats) -> Floats:
    """Load ``[j, i]`` of positions i .. j-1 on ``stage``; infinite where there would be none."""
    prefix = np.concatenate(([0.0], np.cumsum(problem.seconds(stage)[list(order)])))
    load = prefix[:, None] - prefix[None, :] + transfer
    load[np.triu_indices(problem.layers + 1)] = np.inf
    return load


def _transfer(problem: Problem, place: Ints) -> Floats:
    """Seconds of transfer ``[j, i]`` of a stage holding positions i .. j-1. Shape (n+1, n+1)."""
    n = problem.layers
    size = n + 1
    leaving = np.zeros((size, size))  # [last, p]: bytes made at p and last read at ``last``
    returned = np.zeros(n)  # bytes made at p for the caller
    answers = np.zeros(n)  # 1 where something is made for the caller
    asks = np.zeros(n)  # 1 where a user input is read
    next_read = np.full(size, size)  # [i]: first position >= i that reads something made before i
    last_made = np.full(size, -1)  # [j]: last position < j whose value is read at or after j
    for value in problem.values:
        readers = [int(place[layer]) for layer in value.consumers]
        if value.producer == HOST:
            asks[readers] = 1
            continue
        made = int(place[value.producer])
        if value.returned:
            returned[made] += value.nbytes
            answers[made] = 1
        if not readers:
            continue
        last = max(readers)
        leaving[last, made] += value.nbytes
        np.maximum(last_made[made + 1 : last + 1], made, out=last_made[made + 1 : last + 1])
        for at in readers:
            np.minimum(next_read[made + 1 : at + 1], at, out=next_read[made + 1 : at + 1])

    # [j, p]: bytes made at p < j that are read at or after j; then summed over p >= i.
    alive = np.tril(leaving[::-1].cumsum(axis=0)[::-1], -1)
    sent = alive[:, ::-1].cumsum(axis=1)[:, ::-1]

    def within(amounts: Floats) -> Floats:
        prefix = np.concatenate(([0.0], np.cumsum(amounts)))
        return prefix[:, None] - prefix[None, :]

    ends, starts = np.arange(size)[:, None], np.arange(size)[None, :]
    edges = (next_read[None, :] < ends).astype(np.float64)
    edges += starts <= last_made[:, None]
    edges += within(answers) > 0
    edges += within(asks) > 0
    return problem.link.latency * edges + (sent + within(returned)) / problem.link.bandwidth


__all__ = ["chain_cuts", "orders"]
