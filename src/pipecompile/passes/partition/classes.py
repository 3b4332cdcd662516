"""Devices that are alike, and the distinct ways to line unlike ones up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.problem import Arrangement, Problem

#: How many devices of each class a stage takes.
Group = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What matters of a class of devices: the best link any of its transfers can have, and its memory."""

    latency: float
    bandwidth: float
    copies: float
    memory: float


@dataclass(frozen=True, eq=False)
class Classes:
    """``members[c]``: the devices of class c, in order. All of them cost the same wherever they stand."""

    problem: Problem
    members: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...]

    @property
    def counts(self) -> Group:
        """Devices in each class."""
        return tuple(len(devices) for devices in self.members)

    @property
    def latency(self) -> bool:
        """Whether a message costs anything by itself."""
        return any(kind.latency and kind.copies for kind in self.kinds)

    @property
    def rate(self) -> float:
        """The most base cost any device can compute in a second."""
        return max(relative_speed(self.problem, devices[0]) for devices in self.members)

    def groups(self) -> list[Group]:
        """What a stage can run on: one device of a class, or several devices if stages may be replicated."""
        if not self.problem.replicas:
            size = len(self.members)
            return [tuple(int(i == c) for i in range(size)) for c in reversed(range(size))]
        every = product(*(range(count + 1) for count in self.counts))
        return sorted((group for group in every if sum(group)), key=lambda group: (sum(group), group))

    def barred(self, group: Group) -> NDArray[np.bool_]:
        """Layers that must not run on such a group. Shape (layers,)."""
        problem = self.problem
        some = [self.members[c][0] for c in range(len(group)) if group[c]]
        bad = np.zeros(problem.layers, dtype=np.bool_)
        for layer, wanted in problem.allowed.items():
            bad[layer] = not wanted.issuperset(some)
        if sum(group) > 1:
            bad[list(problem.single)] = True
        return bad

    def arrange(self, groups: list[Group]) -> Arrangement:
        """Devices for a sequence of groups, taken from each class in order."""
        left = [list(devices) for devices in self.members]
        return tuple(
            tuple(sorted(left[c].pop(0) for c, count in enumerate(group) for _ in range(count))) for group in groups
        )


def relative_speed(problem: Problem, device: int) -> float:
    """The most base cost the device computes in a second, over layers that cost anything."""
    place = problem.places[device]
    if not place.cost:
        return place.speed
    ratios = [base / own if own else np.inf for base, own in zip(problem.cost, place.cost, strict=True) if base]
    return max(ratios, default=1.0)


def classes_of(problem: Problem) -> Classes:
    """The classes of a problem's devices, by first member."""
    pinned = sorted(problem.allowed)

    def key(device: int) -> tuple[object, ...]:
        place = problem.places[device]
        to = [problem.between(device, other) for other in range(len(problem.places)) if other != device]
        back = [problem.between(other, device) for other in range(len(problem.places)) if other != device]
        links = sorted((link.latency, link.bandwidth) for link in (*to, *back)) if problem.links else ()
        return (
            place.speed,
            place.memory,
            place.cost,
            place.copies,
            tuple(device in problem.allowed[layer] for layer in pinned),
            tuple(links),
        )

    found: dict[tuple[object, ...], list[int]] = {}
    for device in range(len(problem.places)):
        found.setdefault(key(device), []).append(device)
    members: list[tuple[int, ...]] = []
    for devices in found.values():
        # The same links in another pattern do not make two devices alike.
        members += [tuple(devices)] if not problem.links else [(device,) for device in devices]
    kinds: list[Kind] = []
    for devices in members:
        first, place = devices[0], problem.places[devices[0]]
        others = [d for d in range(len(problem.places)) if d != first]
        links = [problem.link, *(problem.between(first, d) for d in others)]
        links += [problem.between(d, first) for d in others]
        latency, bandwidth = min(link.latency for link in links), max(link.bandwidth for link in links)
        kinds.append(Kind(latency, bandwidth, place.copies, place.memory))
    return Classes(problem, tuple(members), tuple(kinds))


def arrangements(classes: Classes, empties: bool) -> Iterator[Arrangement]:
    """Distinct device orders (with replicas: ordered groups), the devices' own order first.

    ``empties``: whoever asks allows stages to be empty, so that arrangements of fewer devices need
    not be listed where devices may be idle.
    """
    problem, groups = classes.problem, classes.groups()
    if not problem.replicas:
        groups.reverse()
    fewer = problem.idle and not empties and problem.chunks == 1
    for order in _sequences(groups, classes.counts, fewer):
        if order:
            yield classes.arrange(order) * problem.chunks


def _sequences(groups: list[Group], left: Group, fewer: bool) -> Iterator[list[Group]]:
    """Sequences of groups that use up ``left`` (or any part of it, if ``fewer``)."""
    if not any(left):
        yield []
        return
    for group in groups:
        rest = tuple(have - take for have, take in zip(left, group, strict=True))
        if min(rest) >= 0:
            for following in _sequences(groups, rest, fewer):
                yield [group, *following]
    if fewer:
        yield []


__all__ = ["Classes", "Group", "Kind", "arrangements", "classes_of", "relative_speed"]
