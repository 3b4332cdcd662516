"""What the layers between two downsets cost, as a sum of products.

A stage holds the layers of a downset I that are not in a smaller one J. Whether a value leaves or
enters such a stage is a product of something about J and something about I (or a few such
products), so the costs of all pairs are one matrix product, or, where the downsets are the
prefixes of an order and each factor therefore an interval, sums over rectangles.

The costs count a value once however many stages read it, and at most one edge a side and direction:
exact where nothing skips a stage, and never more than :func:`~pipecompile.passes.partition.load.judge` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.downsets import Bools, Family, Floats
from pipecompile.passes.partition.problem import HOST, Problem, Value


#: Some of a family's downsets: flags, or in a chain the first one and the one after the last.
Some = Bools | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Term:
    """``amounts[kind]`` for every pair with J in ``before`` and I in ``upto``."""

    before: Some
    upto: Some
    amounts: dict[str, float]


@dataclass
class Terms:
    """Sums of products, and amounts that are plain sums over the layers (``plain[kind]``, one a layer).

    Kinds: ``bytes`` paid for, ``weights`` and ``tied`` (bytes used here, and those used elsewhere
    too), ``rings`` (bytes), ``activations``; and counts of what makes an edge necessary: ``out``,
    ``in`` (forward), ``back_out``, ``back_in`` (gradients), ``returns``, ``asks`` (the caller).
    """

    products: list[Term] = field(default_factory=list[Term])
    plain: dict[str, Floats] = field(default_factory=dict[str, Floats])

    @property
    def kinds(self) -> set[str]:
        """All kinds that occur."""
        return set(self.plain).union(*(term.amounts for term in self.products))


#: Kinds that only say whether there is an edge.
EDGES = ("out", "in", "back_out", "back_in", "returns", "asks")


def terms_of(problem: Problem, family: Family) -> Terms:
    """The costs of all stages that the family's downsets can bound."""
    found = Terms()
    place = family.places
    rate, slots = problem.traffic.receive, problem.memory.slots

    def plain(kind: str, layer: int, amount: float) -> None:
        if amount:
            found.plain.setdefault(kind, np.zeros(problem.layers))[layer] += amount

    for value in problem.values:
        if value.producer == HOST:
            amounts = {"bytes": rate * value.nbytes, "rings": slots * value.nbytes}
            found.products += [_term(b, u, amounts) for b, u in _touches(family, value.consumers)]
            continue
        if value.returned:
            plain("bytes", value.producer, value.nbytes)
        leaving = {
            "bytes": value.nbytes + rate * value.gradient,
            "rings": slots * value.gradient,
            "out": float(not value.backward),
            "back_in": float(value.gradient > 0),
        }
        entering = {
            "bytes": rate * value.nbytes + value.gradient,
            "rings": slots * value.nbytes,
            "in": float(not value.backward),
            "back_out": float(value.gradient > 0),
        }
        if place is not None and value.consumers and not value.backward:
            _in_chain(found, place, family.size, value, leaving, entering)
            continue
        for before, upto, sign in _leaves(family, value):
            found.products.append(_term(before, upto, {k: sign * a for k, a in leaving.items()}))
        found.products += [_term(b, u, entering) for b, u in _enters(family, value)]
    for layer in {value.producer for value in problem.values if value.returned and value.producer != HOST}:
        plain("returns", layer, 1.0)
    for layer in {layer for value in problem.values if value.producer == HOST for layer in value.consumers}:
        plain("asks", layer, 1.0)
    for weight in problem.weights:
        users = tuple(sorted(set(weight.users)))
        if len(users) == 1:
            plain("weights", users[0], weight.nbytes)
            continue
        both = {"weights": weight.nbytes, "tied": weight.nbytes}
        found.products += [_term(b, u, both) for b, u in _touches(family, users)]
        held = family.member[:, list(users)]
        found.products.append(_term(~_any(held), _all(held), {"tied": -weight.nbytes}))
    for layer, nbytes in enumerate(problem.activations):
        plain("activations", layer, nbytes)
    return found


def _any(flags: Bools) -> Bools:
    return np.asarray(flags.any(axis=1))


def _all(flags: Bools) -> Bools:
    return np.asarray(flags.all(axis=1))


def _in_chain(
    found: Terms, place: list[int], size: int, value: Value, leaving: dict[str, float], entering: dict[str, float]
) -> None:
    """The products of a value in a chain, where all factors are intervals: the same as below, but quicker."""
    made, readers = place[value.producer], sorted({place[layer] for layer in value.consumers})
    found.products.append(_term((0, made + 1), (made + 1, readers[-1] + 1), leaving))
    for before, reader in pairwise((made, *readers)):
        found.products.append(_term((before + 1, reader + 1), (reader + 1, size), entering))


def _term(before: Some, upto: Some, amounts: dict[str, float]) -> Term:
    return Term(before, upto, {kind: amount for kind, amount in amounts.items() if amount})


def _touches(family: Family, layers: tuple[int, ...]) -> Iterator[tuple[Bools, Bools]]:
    """Products whose sum is 1 where any of the layers lies in the stage."""
    yield from _adds(family, layers, np.ones(family.size, dtype=np.bool_))


def _adds(family: Family, layers: tuple[int, ...], when: Bools) -> Iterator[tuple[Bools, Bools]]:
    """Products whose sum is 1 where ``when[J]`` and any of the layers is in I and not in J."""
    held = family.member[:, list(layers)]
    if len(layers) == 1:
        yield when & ~held[:, 0], held[:, 0]
        return
    patterns, index = _patterns(held, when)
    for i, pattern in enumerate(patterns):
        if not pattern.all():
            yield index == i, _any(held[:, ~pattern])


def _patterns(held: Bools, when: Bools) -> tuple[Bools, NDArray[np.intp]]:
    """The distinct rows of ``held`` among those in ``when``, and which of them each row is (-1: none)."""
    rows = held[when]
    packed = np.packbits(rows, axis=1)
    if packed.shape[1] <= 8:  # as one number a row, which sorts many times faster than rows do
        words = np.zeros((len(rows), 8), dtype=np.uint8)
        words[:, : packed.shape[1]] = packed
        _, first, which = np.unique(words.view(np.uint64)[:, 0], return_index=True, return_inverse=True)
    else:
        _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    index = np.full(len(held), -1)
    index[when] = which.reshape(-1)
    return rows[first], index


def _enters(family: Family, value: Value) -> Iterator[tuple[Bools, Bools]]:
    """Products whose sum is 1 where a reader lies in the stage and the producer outside it."""
    made = family.member[:, value.producer]
    yield from _adds(family, value.consumers, made)
    if not value.backward:
        return
    # The producer lies in a later stage: not in I.
    held = family.member[:, list(value.consumers)]
    patterns, index = _patterns(held, ~made)
    for i, pattern in enumerate(patterns):
        if pattern.any():
            yield ~_all(held[:, pattern]), index == i


def _leaves(family: Family, value: Value) -> Iterator[tuple[Bools, Bools, float]]:
    """Signed products whose sum is 1 where the producer lies in the stage and a reader outside it."""
    if not value.consumers:
        return
    made = family.member[:, value.producer]
    held = family.member[:, list(value.consumers)]
    complete = _all(held)
    if not value.backward:
        yield ~made, made & ~complete, 1.0
        return
    yield ~made, made, 1.0
    yield ~made & ~_any(held), made & complete, -1.0


class Band:
    """The amounts of one kind for blocks of pairs of a chain, asked for in order of rows.

    Every product is a rectangle of pairs, entered with signs at its four corners; sums along both
    axes fill it in. Only the columns asked for are filled.
    """

    def __init__(self, family: Family, terms: Terms, kind: str) -> None:
        corners: list[tuple[int, int, float]] = []
        for term in terms.products:
            amount = term.amounts.get(kind)
            if amount:
                (a, b), (c, d) = _interval(term.before), _interval(term.upto)
                corners += [(c, a, amount), (c, b, -amount), (d, a, -amount), (d, b, amount)]
        corners.sort()
        table = np.array(corners).reshape(-1, 3)
        self.rows, self.columns = table[:, 0].astype(np.intp), table[:, 1].astype(np.intp)
        self.amounts = table[:, 2]
        self.above = np.zeros(family.size + 1)
        self.done, self.at = 0, 0
        self.total = family.total(terms.plain[kind]) if kind in terms.plain else None

    def block(self, rows: slice, columns: slice) -> Floats:
        """Amounts of a block of pairs. Shape (rows, columns)."""
        if rows.start < self.done:
            raise ValueError("blocks must be asked for in order of rows")
        start, end = np.searchsorted(self.rows, (rows.start, rows.stop))
        skipped = slice(self.at, start)
        np.add.at(self.above, self.columns[skipped], self.amounts[skipped])
        grid = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
        grid[0] = self.above[columns]
        grid[0, 0] += self.above[: columns.start].sum()
        here = slice(start, end)
        inside = self.columns[here] < columns.stop
        column = np.maximum(self.columns[here][inside] - columns.start, 0)
        np.add.at(grid, (self.rows[here][inside] - rows.start, column), self.amounts[here][inside])
        np.add.at(self.above, self.columns[here], self.amounts[here])
        self.done, self.at = rows.stop, end
        np.cumsum(grid, axis=0, out=grid)
        np.cumsum(grid, axis=1, out=grid)
        if self.total is not None:
            grid += self.total[rows, None]
            grid -= self.total[None, columns]
        return grid


def _interval(some: Some) -> tuple[int, int]:
    """The first true position and the one after the last: in a chain the true ones are consecutive."""
    if isinstance(some, tuple):
        return some
    first = int(some.argmax())
    return (first, first + int(np.count_nonzero(some))) if some[first] else (0, 0)


@dataclass(frozen=True, eq=False)
class Factors:
    """The products of one kind as two matrices, for families that are no chains."""

    before: NDArray[np.float64]
    upto: NDArray[np.float64]
    total: Floats

    def block(self, rows: slice, columns: slice) -> Floats:
        """Amounts of a block of pairs. Shape (rows, columns)."""
        amounts = self.upto[rows] @ self.before[columns].T
        amounts += self.total[rows, None]
        amounts -= self.total[None, columns]
        return amounts


def factors(family: Family, terms: Terms, kind: str) -> Factors:
    """The products of one kind, those with the same first factor added up."""
    sums: dict[bytes, NDArray[np.float64]] = {}
    firsts: dict[bytes, Bools] = {}
    for term in terms.products:
        amount = term.amounts.get(kind)
        if not amount:
            continue
        assert not isinstance(term.before, tuple)
        assert not isinstance(term.upto, tuple)
        key = np.packbits(term.before).tobytes()
        firsts[key] = term.before
        sums[key] = np.asarray(sums.get(key, 0.0) + amount * term.upto, dtype=np.float64)
    total = family.total(terms.plain[kind]) if kind in terms.plain else np.zeros(family.size)
    if not sums:
        empty = np.zeros((family.size, 0))
        return Factors(empty, empty, total)
    before = np.stack([firsts[key] for key in sums], axis=1).astype(np.float64)
    return Factors(np.ascontiguousarray(before), np.ascontiguousarray(np.stack(list(sums.values()), axis=1)), total)


__all__ = ["EDGES", "Band", "Factors", "Term", "Terms", "factors", "terms_of"]
