"""Families of downsets: what the first stages of a pipeline can hold between them.

A downset holds, with a layer, all it needs. The prefixes of one topological order are a family
(a chain); all downsets of a graph are another, exponentially large one on wide graphs and small on
narrow ones. A pipeline is a path through a family, each step adding the layers of one stage.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.problem import Assignment, Problem

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Family:
    """``member[i, v]``: layer v is in downset i. Shape (downsets, layers), lightest first.

    ``chain``: each contains the one before.
    """

    member: Bools
    chain: bool

    @property
    def size(self) -> int:
        """Number of downsets."""
        return len(self.member)

    @cached_property
    def places(self) -> list[int] | None:
        """Of a chain, the position of each layer in the order."""
        return (self.size - self.member.sum(axis=0) - 1).tolist() if self.chain else None

    @cached_property
    def ends(self) -> tuple[int, int]:
        """Which downset is empty and which is full."""
        sizes = self.member.sum(axis=1)
        return int(sizes.argmin()), int(sizes.argmax())

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        """Membership as bit sets. Shape (downsets, words)."""
        packed = np.packbits(self.member, axis=1)
        padded = np.zeros((self.size, -(-max(1, packed.shape[1]) // 8) * 8), dtype=np.uint8)
        padded[:, : packed.shape[1]] = packed
        return padded.view(np.uint64)

    def total(self, amounts: Floats) -> Floats:
        """Sum of a per-layer amount over each downset. Shape (downsets,)."""
        if self.places is not None:
            ordered = np.zeros(self.size)
            ordered[np.asarray(self.places, dtype=np.intp) + 1] = amounts
            return np.cumsum(ordered)
        return self.member @ amounts


def chain(order: tuple[int, ...]) -> Family:
    """The prefixes of a topological order."""
    n = len(order)
    place = np.empty(n, dtype=np.intp)
    place[list(order)] = np.arange(n)
    return Family(np.arange(n + 1)[:, None] > place[None, :], chain=True)


def all_downsets(problem: Problem, most: int) -> Family | None:
    """Every downset of the graph; None if there are more than ``most``."""
    n = problem.layers
    needs = [sum(1 << u for u in problem.graph.predecessors(v)) for v in range(n)]
    after = [list(problem.graph.successors(v)) for v in range(n)]
    sources = [v for v in range(n) if not needs[v]]
    ready: dict[int, tuple[int, ...]] = {0: tuple(sources)}
    level, found = [0], [0]
    while level:
        following: dict[int, tuple[int, ...]] = {}
        for held in level:
            for v in ready[held]:
                grown = held | 1 << v
                if grown in following:
                    continue
                opened = [w for w in after[v] if not needs[w] & ~grown]
                following[grown] = (*(w for w in ready[held] if w != v), *opened)
        found += following
        if len(found) > most:
            return None
        level, ready = list(following), following
    width = -(-max(1, n) // 8)
    raw = np.frombuffer(b"".join(held.to_bytes(width, "little") for held in found), dtype=np.uint8)
    member = np.unpackbits(raw.reshape(len(found), width), axis=1, bitorder="little")[:, :n].astype(np.bool_)
    weight = member @ np.asarray(problem.cost, dtype=np.float64)
    order = np.lexsort((member.sum(axis=1), weight))
    return Family(np.ascontiguousarray(member[order]), chain=False)


def orders(problem: Problem) -> list[tuple[int, ...]]:
    """Distinct topological orders to try: as given, depth first both ways, by level, lightest border first."""
    graph = problem.graph
    found = [
        tuple(range(problem.layers)),
        tuple(reversed(list(nx.dfs_postorder_nodes(graph)))),
        tuple(nx.dfs_postorder_nodes(graph.reverse())),
        _lightest(problem),
        tuple(nx.topological_sort(graph)),
    ]
    return list(dict.fromkeys(found))


def _lightest(problem: Problem) -> tuple[int, ...]:
    """Next always the ready layer after which the fewest bytes are alive."""
    waiting: dict[int, int] = {}
    reads: list[list[int]] = [[] for _ in range(problem.layers)]
    makes: list[list[int]] = [[] for _ in range(problem.layers)]
    for index, value in enumerate(problem.values):
        if value.producer >= 0 and not value.backward:
            waiting[index] = len(set(value.consumers))
            makes[value.producer].append(index)
            for layer in set(value.consumers):
                reads[layer].append(index)
    left = {v: problem.graph.in_degree(v) for v in problem.graph}
    ready = [v for v in problem.graph if not left[v]]
    order: list[int] = []
    while ready:

        def growth(v: int) -> tuple[float, int]:
            made = sum(problem.values[i].nbytes for i in makes[v] if waiting[i])
            freed = sum(problem.values[i].nbytes for i in reads[v] if waiting[i] == 1)
            return made - freed, -len(order) + v

        best = min(ready, key=growth)
        ready.remove(best)
        order.append(best)
        for index in reads[best]:
            waiting[index] -= 1
        for follower in problem.graph.successors(best):
            left[follower] -= 1
            if not left[follower]:
                ready.append(follower)
    return tuple(order)


def around(problem: Problem, stage_of: Assignment, rng: random.Random, turn: int) -> tuple[int, ...]:
    """A random topological order in which the stages of a plan are consecutive.

    The dynamic program along it returns no worse a plan, and may part each stage anew. In turns, the
    order is built from its front or from its back, and a layer's rank within its stage is drawn, or
    mostly taken from one it needs, which keeps branches together.
    """
    needs, after = problem.graph.pred, problem.graph.succ
    rank = [rng.random() for _ in stage_of]
    if turn % 4 >= 2:
        for v in range(problem.layers):
            if needs[v] and rng.random() < 0.8:
                rank[v] = rank[rng.choice(list(needs[v]))]
    back = bool(turn % 2)
    before, behind = (after, needs) if back else (needs, after)
    key = [-(stage + part) if back else stage + part for stage, part in zip(stage_of, rank, strict=True)]
    left = [len(before[v]) for v in range(problem.layers)]
    ready = [(key[v], v) for v in range(problem.layers) if not left[v]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        v = heapq.heappop(ready)[1]
        order.append(v)
        for w in behind[v]:
            left[w] -= 1
            if not left[w]:
                heapq.heappush(ready, (key[w], w))
    return tuple(reversed(order) if back else order)


__all__ = ["Family", "all_downsets", "around", "chain", "orders"]
