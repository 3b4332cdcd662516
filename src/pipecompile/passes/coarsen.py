"""Coarsen: merge layers that no good plan parts, so that large models are planned faster.

Three kinds of merge, in this order. *Lossless*: a layer that costs nothing joins the only layer it reads
from, or the only one that reads it, where the border beyond it is no heavier; some optimum keeps them
together. *Bounded* (``passes/followers.py``): layers join what they follow, as long as it is proved that the
optimum of the groups is at most ``loss`` above the optimum of the layers. *Unproved*, only where these leave
more than ``most`` groups: neighbours join along the heaviest transfers while a group stays below ``share`` of
an even stage.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import inf

import numpy as np
from networkx.utils import UnionFind

from pipecompile.passes.followers import covered, follow, messages
from pipecompile.passes.partition.contract import Contraction, contract
from pipecompile.passes.partition.even import floor
from pipecompile.passes.partition.problem import HOST, Problem, Value


@dataclass(frozen=True)
class Coarsened(Contraction):
    """A contraction whose optimum is at most ``excess`` seconds above the layers' (infinite: not proved)."""

    excess: float


@dataclass(frozen=True)
class Coarsen:
    """Merge layers until at most ``most`` groups are left, or every merge would lose too much.

    ``loss`` is what bounded merges may lose, as a part of the least possible load; ``share`` bounds the groups
    of unproved merges, as a part of an even stage (0: none are made).
    """

    most: int = 200
    share: float = 0.02
    loss: float = 0.02

    def apply(self, problem: Problem) -> Coarsened:
        """The problem with its layers merged; bounded and unproved merges only as far as needed."""
        merged, excess = contract(problem, problem.together), inf
        if covered(merged.problem):
            merged, excess = _chain(merged, lossless(merged.problem)), messages(problem)
            merged, excess = self._bounded(merged, excess)
        else:
            merged = _chain(merged, lossless(merged.problem))
        while len(merged.groups) > self.most and self.share:
            before = len(merged.groups)
            merged, excess = _chain(merged, self._round(merged.problem)), inf
            if len(merged.groups) > 0.98 * before:
                break
        return Coarsened(merged.problem, merged.groups, excess)

    def _bounded(self, merged: Contraction, excess: float) -> tuple[Contraction, float]:
        """Rounds of followers, each of which may lose half of what the ones before left."""
        most = self.loss * floor(merged.problem)
        while len(merged.groups) > self.most and excess < most:
            pairs, more = follow(merged.problem, (most - excess) / 2)
            if not pairs:
                break
            merged, excess = _chain(merged, pairs), excess + more
        return merged, excess

    def _round(self, problem: Problem) -> list[tuple[int, int]]:
        """Pairs to merge, each layer in one at most: the heaviest transfers first."""
        devices = len(problem.places) * problem.chunks
        cost = np.max([problem.seconds(device) for device in range(len(problem.places))], axis=0)
        limit = self.share * float(cost.sum()) / devices
        busy, pairs = set[int](), list[tuple[int, int]]()
        left = problem.layers - self.most
        for u, v in _candidates(problem):
            if len(pairs) >= left:
                break
            if u not in busy and v not in busy and cost[u] + cost[v] <= limit and _alike(problem, u, v):
                busy |= {u, v}
                pairs.append((u, v))
        return pairs


def _chain(before: Contraction, pairs: list[tuple[int, int]]) -> Contraction:
    """Merge further what is merged already."""
    after = contract(before.problem, pairs)
    groups = tuple(tuple(v for part in group for v in before.groups[part]) for group in after.groups)
    return Contraction(after.problem, groups)


def _candidates(problem: Problem) -> list[tuple[int, int]]:
    """Pairs whose merging leaves no cycle, by the bytes that pass between them, most first."""
    graph = problem.graph
    weight: dict[tuple[int, int], float] = defaultdict(float)
    for value in problem.values:
        for layer in value.consumers if value.producer != HOST else ():
            pair = (min(value.producer, layer), max(value.producer, layer))
            weight[pair] += (value.nbytes + value.gradient) / len(value.consumers)
    only = [
        (u, v) for u, v in problem.edges if graph.out_degree(u) == 1 or graph.in_degree(v) == 1
    ]  # another path from u to v would leave u and enter v by other edges
    twins: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    beside: list[tuple[int, int]] = []
    for v in graph:
        ends = (tuple(sorted(graph.predecessors(v))), tuple(sorted(graph.successors(v))))
        if ends in twins and any(ends):
            beside.append((twins.pop(ends), v))
        else:
            twins[ends] = v
    return sorted(only, key=lambda pair: -weight[pair]) + beside


def _alike(problem: Problem, u: int, v: int) -> bool:
    """Whether the same devices may run both."""
    return problem.allowed.get(u) == problem.allowed.get(v) and (u in problem.single) == (v in problem.single)


def lossless(problem: Problem) -> list[tuple[int, int]]:
    """Pairs of which one layer costs nothing, and is an end of the graph or passes a single value on."""
    made: dict[int, list[int]] = defaultdict(list)
    read: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(problem.values):
        made[value.producer].append(index)
        for layer in value.consumers:
            read[layer].append(index)
    free = np.all([problem.seconds(device) == 0 for device in range(len(problem.places))], axis=0)
    heavy = {layer for weight in problem.weights for layer in weight.users}
    heavy |= {layer for layer, nbytes in enumerate(problem.activations) if nbytes}
    merged = UnionFind(range(problem.layers))
    pairs: list[tuple[int, int]] = []
    for v in range(problem.layers):
        if not free[v] or v in heavy or v in problem.allowed or v in problem.single:
            continue
        end = _end(problem, v, [problem.values[i] for i in made[v]], [problem.values[i] for i in read[v]])
        if end is not None and merged[v] != merged[end]:
            merged.union(v, end)
            pairs.append((v, end))
        if len(read[v]) != 1 or len(made[v]) != 1:
            continue
        into, out = problem.values[read[v][0]], problem.values[made[v][0]]
        alone = into.consumers == (v,) and len(out.consumers) == 1 and not out.returned and not into.returned
        plain = into.producer != HOST and not into.backward and not out.backward
        degrees = problem.graph.in_degree(v) == 1 and problem.graph.out_degree(v) == 1
        if not (alone and plain and degrees):
            continue
        # Cut on the lighter side: join the neighbour on the heavier one.
        if out.nbytes <= into.nbytes and out.gradient <= into.gradient:
            other = into.producer
        elif into.nbytes <= out.nbytes and into.gradient <= out.gradient:
            other = out.consumers[0]
        else:
            continue
        if merged[v] != merged[other]:
            merged.union(v, other)
            pairs.append((v, other))
    return pairs


def _end(problem: Problem, layer: int, made: list[Value], read: list[Value]) -> int | None:
    """The only neighbour of a free layer at an end of the graph, which may have it for nothing."""
    graph = problem.graph
    if not made and all(value.producer != HOST for value in read) and graph.in_degree(layer) == 1:
        return next(iter(graph.predecessors(layer)))
    alone = all(len(value.consumers) == 1 and not value.returned for value in made)
    if not read and alone and not graph.in_degree(layer) and graph.out_degree(layer) == 1:
        return next(iter(graph.successors(layer)))
    return None


__all__ = ["Coarsen", "Coarsened", "lossless"]
