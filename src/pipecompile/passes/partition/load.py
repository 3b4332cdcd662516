"""What a placement costs: the one function that every candidate plan is judged by.

It shares no code with the models the solvers work on. Those may simplify (the dynamic programs
count a value once however many stages read it, and one edge per side), therefore each candidate is
evaluated here again, and the best by this measure is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from pipecompile.passes.partition.problem import HOST, Placement, Problem

#: Relative amount by which rounding may exceed a limit.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """Costs of a placement.

    ``loads`` and ``memory`` are busy seconds per sample of the stream, and bytes, by device.
    ``stages`` is ``(compute, transfer)`` seconds of one sample in each stage, on the slowest of its
    devices. ``latency`` is the time of one sample alone through the stages one after another.
    ``excess`` says which limits are exceeded, and by how much.
    """

    loads: tuple[float, ...]
    memory: tuple[float, ...]
    stages: tuple[tuple[float, float], ...]
    latency: float
    objective: float
    excess: tuple[str, ...]

    @property
    def slowest(self) -> float:
        """Busy seconds per sample of the busiest device."""
        return max(self.loads, default=0.0)

    @property
    def moved(self) -> float:
        """Seconds all stages spend on transfers: decides between plans of equal objective."""
        return sum(transfer for _, transfer in self.stages)


def judge(problem: Problem, placement: Placement) -> Verdict:
    """Loads, memory and latency of a placement that is feasible as a pipeline.

    There is one edge (one ring, one message a sample) from stage to stage wherever values cross,
    the caller counting as a stage; each end pays the link's latency for it. How the bytes are paid
    for says :class:`~pipecompile.passes.partition.problem.Traffic`. Replicas deal samples in turn:
    the i-th sample goes from device i mod a of one stage to device i mod b of the next. Stages on
    the same device hand values on for nothing. Where copies of a weight lie on several devices,
    every update costs each of them two times its bytes (a ring all-reduce costs less by a factor
    (m - 1) / m for m devices). The caller's own time is not counted.
    """
    compute: dict[tuple[int, int], float] = defaultdict(float)
    for layer, stage in enumerate(placement.stage_of):
        for device in placement.devices[stage]:
            place = problem.places[device]
            compute[stage, device] += place.cost[layer] if place.cost else problem.cost[layer] / place.speed
    transfer = _transfers(problem, placement)
    summing, memory = _weights(problem, placement)
    _activations(problem, placement, memory)

    busy = [0.0] * len(problem.places)
    moving = [seconds * place.copies for seconds, place in zip(summing, problem.places, strict=True)]
    stages: list[tuple[float, float]] = []
    for stage, devices in enumerate(placement.devices):
        single = [(compute[stage, d], transfer[stage, d] * problem.places[d].copies) for d in devices]
        stages.append(max(single, key=sum))
        for device, (computing, sending) in zip(devices, single, strict=True):
            busy[device] += computing / len(devices)
            moving[device] += sending / len(devices)
    overlap = problem.traffic.overlap
    loads = tuple(max(t, c + (1 - overlap) * t) for c, t in zip(busy, moving, strict=True))
    latency = sum(computing + sending for computing, sending in stages)

    slowest = max(loads)
    objective, other, what = (
        (slowest, latency, "latency") if problem.goal.kind == "throughput" else (latency, slowest, "time per sample")
    )
    excess = [
        f"device {place.name or device!r} needs {memory[device]:,.0f} bytes, "
        f"{memory[device] - place.memory:,.0f} more than its {place.memory:,.0f}"
        for device, place in enumerate(problem.places)
        if memory[device] > place.memory * (1 + ROUNDING)
    ]
    if other > problem.goal.limit * (1 + ROUNDING):
        excess.append(f"{what} {other:.6g} s is {other - problem.goal.limit:.3g} s above {problem.goal.limit:.6g} s")
    return Verdict(loads, tuple(memory), tuple(stages), latency, objective, tuple(excess))


def _crossings(problem: Problem, placement: Placement) -> Iterator[tuple[int, int, float]]:
    """``(source stage, target stage, bytes)`` of every copy of a value or a gradient; HOST is the caller."""
    stage_of, devices = placement.stage_of, placement.devices
    for value in problem.values:
        source = HOST if value.producer == HOST else stage_of[value.producer]
        for target in sorted({stage_of[layer] for layer in value.consumers}):
            if source != HOST and devices[source] == devices[target]:
                continue
            yield source, target, value.nbytes
            if value.gradient and source != HOST:
                yield target, source, value.gradient
        if value.returned:
            yield source, HOST, value.nbytes


def _transfers(problem: Problem, placement: Placement) -> dict[tuple[int, int], float]:
    """Seconds per sample that ``(stage, device)`` spends on transfers."""
    spent: dict[tuple[int, int], float] = defaultdict(float)
    rate, devices = problem.traffic.receive, placement.devices
    messages: dict[tuple[int, int], float] = defaultdict(float)
    for source, target, nbytes in _crossings(problem, placement):
        messages[source, target] += 0.0 if problem.traffic.multicast and HOST not in (source, target) else nbytes
    for (source, target), nbytes in messages.items():
        senders = devices[source] if source != HOST else (HOST,)
        readers = devices[target] if target != HOST else (HOST,)
        period = lcm(len(senders), len(readers))
        for sample in range(period):
            sender, reader = senders[sample % len(senders)], readers[sample % len(readers)]
            link = problem.between(sender, reader)
            spent[source, sender] += (link.latency + nbytes / link.bandwidth) * len(senders) / period
            spent[target, reader] += (link.latency + rate * nbytes / link.bandwidth) * len(readers) / period
    if not problem.traffic.multicast:
        return spent
    for value in problem.values:
        if value.producer == HOST:
            continue
        source = placement.stage_of[value.producer]
        groups = {devices[placement.stage_of[layer]]: placement.stage_of[layer] for layer in value.consumers}
        groups.pop(devices[source], None)
        copy, back = value.nbytes / problem.link.bandwidth, value.gradient / problem.link.bandwidth
        for group, stage in groups.items():
            for device in group:
                spent[stage, device] += rate * copy + back
        for device in devices[source] if groups else ():
            spent[source, device] += copy + rate * back
    return spent


def _weights(problem: Problem, placement: Placement) -> tuple[list[float], list[float]]:
    """Seconds per sample spent on summing gradients, and bytes of weights, by device."""
    summing, memory = [0.0] * len(problem.places), [0.0] * len(problem.places)
    for weight in problem.weights:
        stages = {placement.stage_of[layer] for layer in weight.users}
        holders = {device for stage in stages for device in placement.devices[stage]}
        for device in holders:
            memory[device] += weight.nbytes * problem.memory.copies
            if len(holders) > 1 and problem.memory.update_every:
                summing[device] += 2 * weight.nbytes / problem.link.bandwidth / problem.memory.update_every
    return summing, memory


def _activations(problem: Problem, placement: Placement, memory: list[float]) -> None:
    """Add bytes of activations in flight and of ring slots, by device."""
    stage_of, devices = placement.stage_of, placement.devices
    held = [0.0] * len(devices)
    for layer, nbytes in enumerate(problem.activations):
        held[stage_of[layer]] += nbytes
    rings = [0.0] * len(devices)
    for value in problem.values:
        source = HOST if value.producer == HOST else stage_of[value.producer]
        own = devices[source] if source != HOST else None
        targets = {stage_of[layer] for layer in value.consumers if devices[stage_of[layer]] != own}
        for target in targets:
            rings[target] += problem.memory.slots * value.nbytes
        if source != HOST and targets:
            rings[source] += problem.memory.slots * value.gradient
    for stage, group in enumerate(devices):
        flying = -(-problem.memory.in_flight(stage, len(devices)) // len(group))
        for device in group:
            memory[device] += flying * held[stage] + rings[stage]


__all__ = ["Verdict", "judge"]
