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

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.downsets import Bools, Family, Floats
from pipecompile.passes.partition.problem import HOST, Problem, Value


@dataclass(frozen=True, eq=False)
class Term:
    """``amounts[kind]`` for every pair with ``before[J]`` and ``upto[I]``."""

    before: Bools
    upto: Bools
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


def _term(before: Bools, upto: Bools, amounts: dict[str, float]) -> Term:
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
    patterns, which = np.unique(held[when], axis=0, return_inverse=True)
    index = np.full(family.size, -1)
    index[when] = which.reshape(-1)
    for i, pattern in enumerate(patterns):
        if not pattern.all():
            yield index == i, _any(held[:, ~pattern])


def _enters(family: Family, value: Value) -> Iterator[tuple[Bools, Bools]]:
    """Products whose sum is 1 where a reader lies in the stage and the producer outside it."""
    made = family.member[:, value.producer]
    yield from _adds(family, value.consumers, made)
    if not value.backward:
        return
    # The producer lies in a later stage: not in I.
    held = family.member[:, list(value.consumers)]
    patterns, which = np.unique(held[~made], axis=0, return_inverse=True)
    index = np.full(family.size, -1)
    index[~made] = which.reshape(-1)
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


def dense(family: Family, terms: Terms, kind: str) -> Floats:
    """The amounts of one kind for all pairs of a chain. Shape (downsets I, downsets J)."""
    size = family.size
    grid = np.zeros((size + 1, size + 1))
    for term in terms.products:
        amount = term.amounts.get(kind)
        if amount:
            (a, b), (c, d) = _interval(term.before), _interval(term.upto)
            grid[c, a] += amount
            grid[c, b] -= amount
            grid[d, a] -= amount
            grid[d, b] += amount
    amounts = grid.cumsum(axis=0).cumsum(axis=1)[:size, :size]
    if kind in terms.plain:
        total = family.total(terms.plain[kind])
        amounts += total[:, None]
        amounts -= total[None, :]
    return amounts


def _interval(flags: Bools) -> tuple[int, int]:
    """The first true position and the one after the last: in a chain the true ones are consecutive."""
    first = int(flags.argmax())
    return (first, first + int(np.count_nonzero(flags))) if flags[first] else (0, 0)


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
        key = np.packbits(term.before).tobytes()
        firsts[key] = term.before
        sums[key] = np.asarray(sums.get(key, 0.0) + amount * term.upto, dtype=np.float64)
    total = family.total(terms.plain[kind]) if kind in terms.plain else np.zeros(family.size)
    if not sums:
        empty = np.zeros((family.size, 0))
        return Factors(empty, empty, total)
    before = np.stack([firsts[key] for key in sums], axis=1).astype(np.float64)
    return Factors(np.ascontiguousarray(before), np.ascontiguousarray(np.stack(list(sums.values()), axis=1)), total)


__all__ = ["EDGES", "Factors", "Term", "Terms", "dense", "factors", "terms_of"]
