"""Contract layers of a problem into groups, and bring placements back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from networkx.utils import UnionFind

from pipecompile.errors import PlanError
from pipecompile.passes.partition.problem import HOST, Place, Placement, Problem, Value, Weight


@dataclass(frozen=True)
class Contraction:
    """A smaller ``problem`` each of whose layers is a group of the original's (``groups``)."""

    problem: Problem
    groups: tuple[tuple[int, ...], ...]

    def expand(self, placement: Placement) -> Placement:
        """The original problem's placement that a placement of the groups stands for."""
        stage_of = [0] * sum(len(group) for group in self.groups)
        for group, stage in zip(self.groups, placement.stage_of, strict=True):
            for layer in group:
                stage_of[layer] = stage
        return Placement(tuple(stage_of), placement.devices)

    def shrink(self, placement: Placement) -> Placement | None:
        """The groups' placement an original one amounts to, or None if it parts a group."""
        stages = [{placement.stage_of[layer] for layer in group} for group in self.groups]
        if any(len(found) > 1 for found in stages):
            return None
        return Placement(tuple(found.pop() for found in stages), placement.devices)


def contract(problem: Problem, merges: Iterable[Sequence[int]]) -> Contraction:
    """Merge each listed set of layers, and whatever then lies on a cycle, which no cut can part.

    Raises:
        PlanError: if layers that end up together are pinned to different devices.
    """
    groups = UnionFind(range(problem.layers))
    for layers in merges:
        groups.union(*layers)
    first = {v: groups[v] for v in range(problem.layers)}
    merged: nx.DiGraph[int] = nx.DiGraph()
    merged.add_nodes_from(dict.fromkeys(first.values()))
    merged.add_edges_from((first[i], first[j]) for i, j in problem.edges if first[i] != first[j])
    for cycle in nx.strongly_connected_components(merged):
        groups.union(*cycle)
    members: dict[int, list[int]] = {}
    for v in range(problem.layers):
        members.setdefault(groups[v], []).append(v)
    final: nx.DiGraph[int] = nx.DiGraph()
    final.add_nodes_from(members)
    final.add_edges_from((groups[i], groups[j]) for i, j in problem.edges if groups[i] != groups[j])

    def first_member(root: int) -> int:
        return members[root][0]

    order = list(nx.lexicographical_topological_sort(final, key=first_member))
    index = {root: i for i, root in enumerate(order)}
    of = [index[groups[v]] for v in range(problem.layers)]
    return _contracted(problem, of, tuple(tuple(members[root]) for root in order))


def forced(problem: Problem) -> Contraction:
    """Merge what cannot be parted: layers that must share a stage, and the cycles that makes."""
    return contract(problem, problem.together)


def _contracted(problem: Problem, of: list[int], groups: tuple[tuple[int, ...], ...]) -> Contraction:
    allowed: dict[int, frozenset[int]] = {}
    for layer, wanted in problem.allowed.items():
        both = allowed.get(of[layer], wanted) & wanted
        if not both:
            other = next(v for v in groups[of[layer]] if v in problem.allowed and not problem.allowed[v] & wanted)
            raise PlanError(
                f"{problem.name(layer)} is pinned to {_devices(problem, wanted)} and {problem.name(other)} to "
                f"{_devices(problem, problem.allowed[other])}, but they must share a stage"
            )
        allowed[of[layer]] = both

    def summed(amounts: tuple[float, ...]) -> tuple[float, ...]:
        found = [0.0] * len(groups)
        for layer, amount in enumerate(amounts):
            found[of[layer]] += amount
        return tuple(found) if amounts else ()

    def place(device: Place) -> Place:
        return replace(device, cost=summed(device.cost)) if device.cost else device

    weights: dict[tuple[int, ...], float] = {}
    for weight in problem.weights:
        users = tuple(sorted({of[v] for v in weight.users}))
        weights[users] = weights.get(users, 0.0) + weight.nbytes
    needed = 1 if problem.idle or problem.replicas else problem.most_stages
    if needed > max(1, len(groups)):
        raise PlanError(
            f"{needed} stages are wanted, but of {problem.layers} layers only {len(groups)} groups can be parted"
        )
    small = replace(
        problem,
        cost=summed(problem.cost),
        edges=tuple(sorted({(of[i], of[j]) for i, j in problem.edges if of[i] != of[j]})),
        values=_values(problem, of),
        places=tuple(place(device) for device in problem.places),
        weights=tuple(Weight(nbytes, users) for users, nbytes in weights.items()),
        activations=summed(problem.activations),
        allowed=allowed,
        together=(),
        single=frozenset(of[v] for v in problem.single),
        names=tuple(problem.names[group[0]] for group in groups) if problem.names else (),
    )
    return Contraction(small, groups)


def _values(problem: Problem, of: list[int]) -> tuple[Value, ...]:
    """Values between groups; those with the same ends are added up, which costs the same."""
    sums: dict[tuple[int, tuple[int, ...], bool, bool, bool], tuple[float, float]] = {}
    for value in problem.values:
        producer = HOST if value.producer == HOST else of[value.producer]
        consumers = tuple(sorted({of[v] for v in value.consumers} - {producer}))
        if not consumers and not value.returned:
            continue
        # A message with an empty gradient is still a message: kept apart from none at all.
        key = (producer, consumers, value.returned, value.backward, value.gradient > 0)
        nbytes, gradient = sums.get(key, (0.0, 0.0))
        sums[key] = (nbytes + value.nbytes, gradient + value.gradient)
    return tuple(
        Value(producer, consumers, nbytes, returned, gradient, backward)
        for (producer, consumers, returned, backward, _), (nbytes, gradient) in sums.items()
    )


def _devices(problem: Problem, devices: frozenset[int]) -> str:
    return " or ".join(problem.places[device].name or f"device {device}" for device in sorted(devices))


__all__ = ["Contraction", "contract", "forced"]
