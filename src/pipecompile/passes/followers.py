"""Merge layers into what they follow, with a proved bound on what that loses.

A layer with a single predecessor may join the group of that predecessor. Such a group is a tree: all
that comes from outside comes to its *head*, a layer that all other members need.

**Theorem.** Take any plan of the layers and move every layer to the stage of its group's head. The result
is a plan of the groups, and no device's load grows by more than ``excess`` seconds.

*It is a plan.* Where group h reads from group g, its head reads a layer of g, which lies no earlier than
the head of g: stages of heads never run against an edge.

*Load of a stage s.* Layers move to earlier stages only. Stage s gains the members that lay behind it of
groups whose head it has: their costs, and their values that are read outside the group; it no longer sends
the values that passed from its part of the group to the rest and that nobody else reads. For those of its own
layers that move away, it must receive what it reads of their values, but has their costs no more and does not
receive what they alone read. Both are sums over the groups with the head in the first stages (up to s, or
before s) and another member behind. What one group adds at most, whatever part of it is cut off, is found by
dynamic programming over its tree (``_Forest._most``). Two groups of which one lies wholly before the other's
head are never cut at once, so the sum is at most the largest sum, over one group, of it and of all groups
it can be cut together with. (The bounds of several rounds of merging add up.) A stage exchanges at most one message with each other stage and direction, which
bounds what moving does to the latencies of messages.

By the theorem the optimum of the groups is at most ``excess`` above the optimum of the layers, so that a lower
bound for groups, less ``excess``, is one for layers. It is claimed where :func:`covered`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.problem import HOST, Problem, Value

#: How often the size of groups is halved until what they lose is little enough.
HALVINGS = 5


def covered(problem: Problem) -> bool:
    """Whether the theorem holds: throughput alone counts, and every device and link moves data alike."""
    return (
        problem.goal.kind == "throughput"
        and problem.goal.limit == inf
        and problem.idle
        and problem.chunks == 1
        and not problem.replicas
        and not problem.limited
        and not problem.links
        and not problem.traffic.overlap
        and not (problem.memory.update_every and problem.weights)
        and len({place.copies for place in problem.places}) == 1
        and not any(value.backward for value in problem.values)
    )


def follow(problem: Problem, most: float) -> tuple[list[tuple[int, int]], float]:
    """Pairs (layer, follower) to merge, and the ``excess`` in seconds without :func:`messages`: at most ``most``."""
    size = most
    for _ in range(HALVINGS):
        forest = _Forest(problem, size)
        if not forest.pairs:
            break
        excess = forest.excess
        if excess <= most:
            return forest.pairs, excess
        size /= 2
    return [], 0.0


def messages(problem: Problem) -> float:
    """Seconds that all messages a stage can exchange, each paid once, cost it: no move of layers adds more."""
    training = any(value.gradient for value in problem.values)
    count = 2 * (len(problem.places) - 1) * (2 if training else 1) + 2
    return count * problem.link.latency * problem.places[0].copies


@dataclass(frozen=True)
class _Side:
    """What a layer brings (``own``, seconds) when it is cut off, and what each value saves that then passes."""

    own: Sequence[float]
    saved: Sequence[float]
    later: bool
    """Whether layers may lie behind the stage, where they count nothing."""


class _Forest:
    """Trees of followers, each of which takes at most about ``size`` seconds to move."""

    def __init__(self, problem: Problem, size: float) -> None:
        self.problem = problem
        n = problem.layers
        seconds = [problem.seconds(device) for device in range(len(problem.places))]
        self.cost, self.least = np.max(seconds, axis=0), np.min(seconds, axis=0)
        self.made: list[list[int]] = [[] for _ in range(n)]
        for index, value in enumerate(problem.values):
            if value.producer != HOST:
                self.made[value.producer].append(index)
        self.head = list(range(n))
        self.followers: list[list[int]] = [[] for _ in range(n)]
        self.pairs: list[tuple[int, int]] = []
        weight = [0.0] * n
        for v in range(n):
            before = list(problem.graph.pred[v])
            if len(before) != 1:
                continue
            head, more = self.head[before[0]], float(self.cost[v])
            if weight[head] + more <= size and self._alike(head, v):
                weight[head] += more
                self.head[v] = head
                self.followers[before[0]].append(v)
                self.pairs.append((before[0], v))

    def _alike(self, u: int, v: int) -> bool:
        allowed, single = self.problem.allowed, self.problem.single
        return allowed.get(u) == allowed.get(v) and (u in single) == (v in single)

    @cached_property
    def trees(self) -> list[int]:
        """Heads of groups of several layers."""
        return [v for v in range(self.problem.layers) if self.head[v] == v and self.followers[v]]

    @property
    def excess(self) -> float:
        """The theorem's bound in seconds, messages left out."""
        together = self._together()
        found = 0.0
        for side in (self._sender(), self._reader()):
            weight = np.array([self._most(head, side) for head in self.trees])
            found += float((together @ weight).max(initial=0.0))
        return found

    def _inside(self, value: Value) -> bool:
        """Whether only layers of its own group read a value."""
        head = self.head[value.producer]
        return all(self.head[layer] == head for layer in value.consumers)

    def _copies(self, value: Value) -> int:
        """How often a value may have to be sent, should its producer lie before all readers."""
        head = self.head[value.producer]
        outside = sum(self.head[layer] != head for layer in value.consumers)
        most = 1 if self.problem.traffic.multicast else len(self.problem.places) - 1
        return min(outside, most)

    def _sender(self) -> _Side:
        problem, rate = self.problem, self.problem.traffic.receive
        own, saved = [float(cost) for cost in self.cost], [0.0] * len(problem.values)
        each = problem.places[0].copies / problem.link.bandwidth
        for index, value in enumerate(problem.values):
            if value.producer == HOST:
                for layer in value.consumers:
                    own[layer] += rate * value.nbytes * each
                continue
            copy = (value.nbytes + rate * value.gradient) * each
            own[value.producer] += self._copies(value) * copy + value.returned * value.nbytes * each
            saved[index] = copy if self._inside(value) else 0.0
        return _Side(own, saved, later=False)

    def _reader(self) -> _Side:
        problem, rate = self.problem, self.problem.traffic.receive
        own, saved = [-float(cost) for cost in self.least], [0.0] * len(problem.values)
        each = problem.places[0].copies / problem.link.bandwidth
        for index, value in enumerate(problem.values):
            if value.producer != HOST:
                copy = (rate * value.nbytes + value.gradient) * each
                if self._inside(value):
                    saved[index] = copy
                else:
                    own[value.producer] += copy
        return _Side(own, saved, later=True)

    def _most(self, head: int, side: _Side) -> float:
        """The most that a tree adds, over all ways to cut it below its head."""
        order, at = [head], 0
        while at < len(order):
            order += self.followers[order[at]]
            at += 1
        kept, gone = dict[int, float](), dict[int, float]()
        for v in reversed(order):
            below = self.followers[v]
            rest = (max(gone[c], 0.0) if side.later else gone[c] for c in below)
            gone[v] = side.own[v] + sum(rest)
            kept[v] = 0.0
            by_value: dict[int, list[int]] = defaultdict(list)
            for c in below:
                reads = [i for i in self.made[v] if c in self.problem.values[i].consumers]
                by_value[max(reads, key=side.saved.__getitem__, default=-1)].append(c)
            for index, readers in by_value.items():
                whole = sum(kept[c] for c in readers)
                parted = sum(max(kept[c], gone[c]) for c in readers)
                kept[v] += max(whole, parted - (side.saved[index] if index >= 0 else 0.0))
        return kept[head]

    def _together(self) -> NDArray[np.float64]:
        """1 where two trees may be cut at once: neither lies wholly before the other's head."""
        ends = [v for v in range(self.problem.layers) if self.head[v] != v and not self.followers[v]]
        ends.sort(key=lambda v: self.head[v])
        bit = {v: 1 << i for i, v in enumerate(ends)}
        seen = [0] * self.problem.layers
        for v in range(self.problem.layers):
            for u in self.problem.graph.pred[v]:
                seen[v] |= seen[u] | bit.get(u, 0)
        width = -(-max(1, len(ends)) // 8)
        raw = np.frombuffer(b"".join(seen[h].to_bytes(width, "little") for h in self.trees), dtype=np.uint8)
        before = np.unpackbits(raw.reshape(len(self.trees), width), axis=1, bitorder="little")[:, : len(ends)]
        heads = [self.head[v] for v in ends]
        starts = [i for i in range(len(ends)) if not i or heads[i] != heads[i - 1]]
        if not starts:
            return np.zeros((0, 0))
        wholly = np.logical_and.reduceat(before.astype(np.bool_), starts, axis=1)  # [h, g]: g before h's head
        return (~(wholly | wholly.T)).astype(np.float64)


__all__ = ["covered", "follow", "messages"]
