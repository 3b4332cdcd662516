"""All stages between two downsets of a family that any plan within a limit can have, with their costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.classes import Classes, Group
from pipecompile.passes.partition.downsets import Family, Floats
from pipecompile.passes.partition.problem import Problem
from pipecompile.passes.partition.terms import EDGES, Band, Factors, Terms, factors, terms_of

#: Pairs looked at together, which bounds the memory a block takes.
BLOCK = 1 << 20

#: Entries of the factors that make up the costs of all pairs, at most.
MOST_FACTORS = 10_000_000


class TooMany(Exception):
    """There are more pairs, or they take longer, than was allowed. Never leaves this package."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Stages as pairs of downsets: ``upper[i]`` less ``lower[i]``, sorted by ``upper``.

    ``edges`` counts messages, ``amounts`` are as named in :class:`Terms`, ``compute`` is seconds by
    class of device. All of shape (pairs,).
    """

    problem: Problem
    classes: Classes
    family: Family
    upper: NDArray[np.intp]
    lower: NDArray[np.intp]
    edges: Floats
    amounts: dict[str, Floats]
    compute: list[Floats]
    _known: dict[tuple[str, Group], Floats] = field(default_factory=dict[tuple[str, Group], Floats])

    def load(self, group: Group) -> Floats:
        """Least busy seconds per sample of the busiest device of a stage on such a group; inf where not allowed."""
        return self._cached("load", group, self._load)

    def latency(self, group: Group) -> Floats:
        """Least seconds of one sample in the stage, on the slowest device of the group."""
        return self._cached("latency", group, self._latency)

    def transfer(self, group: Group) -> Floats:
        """Least seconds of one sample's transfers, on the slowest device of the group."""
        return self._cached("transfer", group, self._transfer)

    def excess(self, group: Group, stage: int, stages: int) -> Floats:
        """Bytes by which the stage exceeds the memory of a device of the group: negative where it fits."""
        memory = self.problem.memory
        flying = -(-memory.in_flight(stage, stages) // sum(group))
        needed = self.amounts.get("weights", 0.0) * memory.copies + self.amounts.get("rings", 0.0)
        needed = needed + flying * self.amounts.get("activations", 0.0)
        room = min(self.classes.kinds[c].memory for c in range(len(group)) if group[c])
        return needed - room + np.zeros(len(self.upper))

    def _cached(self, what: str, group: Group, make: Callable[[Group], Floats]) -> Floats:
        key = (what, group)
        if key not in self._known:
            self._known[key] = make(group)
        return self._known[key]

    def moving(self, kind: int) -> Floats | float:
        """Least seconds of one sample's transfers on a device of the class."""
        one = self.classes.kinds[kind]
        if not one.copies:
            return 0.0
        return one.copies * (self.edges * one.latency + self.amounts.get("bytes", 0.0) / one.bandwidth)

    def _load(self, group: Group) -> Floats:
        replicas, every = sum(group), self.problem.memory.update_every
        found = np.zeros(len(self.upper))
        for kind, count in enumerate(group):
            if not count:
                continue
            moving = self.moving(kind) / replicas
            if every:
                held = self.amounts.get("weights" if replicas > 1 else "tied", 0.0)
                moving = moving + self.classes.kinds[kind].copies * 2 * held / self.problem.link.bandwidth / every
            computing = self.compute[kind] / replicas
            overlap = self.problem.traffic.overlap
            np.maximum(found, computing + (1 - overlap) * moving, out=found)
            if overlap:
                np.maximum(found, moving, out=found)
        found[self._barred(group)] = inf
        return found

    def _latency(self, group: Group) -> Floats:
        found = np.zeros(len(self.upper))
        for kind, count in enumerate(group):
            if count:
                np.maximum(found, self.compute[kind] + self.moving(kind), out=found)
        found[self._barred(group)] = inf
        return found

    def _transfer(self, group: Group) -> Floats:
        found = np.zeros(len(self.upper))
        for kind, count in enumerate(group):
            if count:
                np.maximum(found, self.moving(kind), out=found)
        return found

    def _barred(self, group: Group) -> NDArray[np.bool_]:
        """Where pins or state forbid such a group."""
        bad = self.classes.barred(group)
        if not bad.any():
            return np.zeros(len(self.upper), dtype=np.bool_)
        count = self.family.total(bad.astype(np.float64))
        return count[self.upper] - count[self.lower] > 0.5


def pairs_of(
    problem: Problem, classes: Classes, family: Family, limit: float, most: int, deadline: float = inf
) -> Pairs:
    """All pairs whose load on some group of devices is at most ``limit`` seconds.

    Raises:
        TooMany: if there are more than ``most``, or the clock (``time.perf_counter``) passes ``deadline``.
    """
    terms = terms_of(problem, family)
    if not family.chain and len(terms.products) * family.size > MOST_FACTORS:
        raise TooMany
    wanted = {"bytes": True, "tied": bool(problem.memory.update_every)}
    wanted["weights"] = problem.limited or wanted["tied"]
    kinds = {kind for kind in terms.kinds if kind not in EDGES and wanted.get(kind, problem.limited)}
    counts = [kind for kind in EDGES if kind in terms.kinds] if classes.latency else []
    seconds = [family.total(problem.seconds(devices[0])) for devices in classes.members]
    widest = len(problem.places) if problem.replicas else 1
    chosen = _Selection(problem, classes, family, seconds, limit * widest)
    blocks: Callable[[str, slice, slice], Floats] = (_banded if family.chain else _sparse)(family, terms)
    parts: list[tuple[NDArray[np.intp], NDArray[np.intp], list[Floats], Floats]] = []
    total = 0
    for rows, columns in chosen.blocks():
        mask = chosen.mask(rows, columns)
        if not mask.any():
            continue
        upper, lower = np.nonzero(mask)
        amounts = [blocks(kind, rows, columns)[upper, lower] for kind in sorted(kinds)]
        edges = np.zeros(len(upper))
        for kind in counts:
            edges += blocks(kind, rows, columns)[upper, lower] > 0.5
        upper, lower = upper + rows.start, lower + columns.start
        keep = chosen.affordable(upper, lower, edges, dict(zip(sorted(kinds), amounts, strict=True)))
        parts.append((upper[keep], lower[keep], [amount[keep] for amount in amounts], edges[keep]))
        total += int(np.count_nonzero(keep))
        if total > most or time.perf_counter() > deadline:
            raise TooMany
    upper = np.concatenate([part[0] for part in parts] or [np.zeros(0, dtype=np.intp)])
    lower = np.concatenate([part[1] for part in parts] or [np.zeros(0, dtype=np.intp)])
    amounts = {
        kind: np.concatenate([part[2][i] for part in parts] or [np.zeros(0)]) for i, kind in enumerate(sorted(kinds))
    }
    edges = np.concatenate([part[3] for part in parts] or [np.zeros(0)])
    compute = [total[upper] - total[lower] for total in seconds]
    return Pairs(problem, classes, family, upper, lower, edges, amounts, compute)


@dataclass(frozen=True, eq=False)
class _Selection:
    """Which pairs are worth costing."""

    problem: Problem
    classes: Classes
    family: Family
    seconds: list[Floats]
    limit: float

    def blocks(self) -> list[tuple[slice, slice]]:
        """Blocks of rows (upper downsets) with the columns that can matter to them."""
        size = self.family.size
        step = max(1, min(size, BLOCK // max(1, size)))
        base = self.family.total(np.asarray(self.problem.cost, dtype=np.float64))
        sorted_base = bool((np.diff(base) >= 0).all())
        widest = self.limit * self.classes.rate  # the most base work a stage can hold
        found: list[tuple[slice, slice]] = []
        for start in range(0, size, step):
            rows = slice(start, min(size, start + step))
            low, high = 0, size
            if sorted_base:
                slack = 1e-9 * base[-1]
                low = int(np.searchsorted(base, base[rows.start] - widest - slack))
                high = int(np.searchsorted(base, base[rows.stop - 1] + slack, side="right"))
            if self.family.chain:
                high = min(high, rows.stop)
            found.append((rows, slice(low, high)))
        return found

    def mask(self, rows: slice, columns: slice) -> NDArray[np.bool_]:
        """Pairs of which one contains the other and the compute is within the limit."""
        if self.family.chain:
            found = np.arange(rows.start, rows.stop)[:, None] > np.arange(columns.start, columns.stop)[None, :]
        else:
            words = self.family.words
            found = np.ones((rows.stop - rows.start, columns.stop - columns.start), dtype=np.bool_)
            for word in range(words.shape[1]):
                found &= (words[None, columns, word] & ~words[rows, None, word]) == 0
            found &= np.arange(rows.start, rows.stop)[:, None] != np.arange(columns.start, columns.stop)[None, :]
        quick = np.zeros(found.shape, dtype=np.bool_)
        for total in self.seconds:
            quick |= total[rows, None] - total[None, columns] <= self.limit * (1 + 1e-9)
        return found & quick

    def affordable(
        self, upper: NDArray[np.intp], lower: NDArray[np.intp], edges: Floats, amounts: dict[str, Floats]
    ) -> NDArray[np.bool_]:
        """Of the pairs, those whose compute and transfer fit the limit on some class of device."""
        if self.limit == inf:
            return np.ones(len(upper), dtype=np.bool_)
        compute = [total[upper] - total[lower] for total in self.seconds]
        pairs = Pairs(self.problem, self.classes, self.family, upper, lower, edges, amounts, compute)
        keep = np.zeros(len(upper), dtype=np.bool_)
        overlap = self.problem.traffic.overlap
        for kind, seconds in enumerate(compute):
            keep |= seconds + (1 - overlap) * pairs.moving(kind) <= self.limit * (1 + 1e-9)
        return keep


def _banded(family: Family, terms: Terms) -> Callable[[str, slice, slice], Floats]:
    known: dict[str, Band] = {}

    def block(kind: str, rows: slice, columns: slice) -> Floats:
        if kind not in known:
            known[kind] = Band(family, terms, kind)
        return known[kind].block(rows, columns)

    return block


def _sparse(family: Family, terms: Terms) -> Callable[[str, slice, slice], Floats]:
    known: dict[str, Factors] = {}

    def block(kind: str, rows: slice, columns: slice) -> Floats:
        if kind not in known:
            known[kind] = factors(family, terms, kind)
        return known[kind].block(rows, columns)

    return block


__all__ = ["Pairs", "TooMany", "pairs_of"]
