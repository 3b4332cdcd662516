"""Independent judges of partitions, and generators of problems. Shares no code with the solvers.

All monotone maps of layers to stages are laid out as one array and costed together, stage by
stage and pair by pair, for every way to deal the devices out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Goal, Memory, Place, Placement, Problem, Traffic, Value, Weight

INF = math.inf


def monotone_maps(problem: Problem, stages: int) -> np.ndarray:
    """All maps of the layers onto exactly ``stages`` stages that no edge runs against. Shape (maps, layers)."""
    maps = np.zeros((1, 0), dtype=np.int8)
    for layer in range(problem.layers):
        maps = np.concatenate([np.column_stack([maps, np.full(len(maps), s, dtype=np.int8)]) for s in range(stages)])
        for i, j in problem.edges:
            if j == layer:
                maps = maps[maps[:, i] <= maps[:, j]]
    for group in problem.together:
        for layer in group[1:]:
            maps = maps[maps[:, group[0]] == maps[:, layer]]
    for stage in range(stages):
        maps = maps[(maps == stage).any(axis=1)]
    return maps


def dealings(problem: Problem) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every sequence of disjoint sets of devices that the problem allows as stages."""
    devices = range(len(problem.places))
    if problem.chunks > 1:
        yield from (tuple((d,) for d in order) * problem.chunks for order in itertools.permutations(devices))
        return

    def extend(done: tuple[tuple[int, ...], ...], left: frozenset[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if done and (not left or problem.idle):
            yield done
        for size in range(1, (len(left) if problem.replicas else 1) + 1):
            for group in itertools.combinations(sorted(left), size):
                yield from extend((*done, group), left - set(group))

    yield from (found for found in extend((), frozenset(devices)) if len(found) <= problem.layers)


def evaluate(problem: Problem, maps: np.ndarray, devices: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, ...]:
    """For each map: largest load, latency, and whether memory and pins hold. Each of shape (maps,)."""
    count, stages, traffic, memory = len(maps), len(devices), problem.traffic, problem.memory
    there = [maps == s for s in range(stages)]
    has = [[there[s][:, v] for v in range(problem.layers)] for s in range(stages)]
    k = len(problem.places)
    busy, moving, used = np.zeros((k, count)), np.zeros((k, count)), np.zeros((k, count))
    latency, fine = np.zeros(count), np.ones(count, dtype=bool)

    def reads(value: Value, s: int) -> np.ndarray:
        return np.any([has[s][v] for v in value.consumers], axis=0) if value.consumers else np.zeros(count, dtype=bool)

    def makes(value: Value, s: int) -> np.ndarray:
        own = [has[t][value.producer] for t in range(stages) if devices[t] == devices[s]]
        return np.any(own, axis=0) if value.producer >= 0 else np.zeros(count, dtype=bool)

    sent: dict[tuple[int, int, int], np.ndarray] = {}  # (device, stage, other) -> seconds a sample of its own
    spent = np.zeros((stages, k, count))
    for s, t in itertools.product(range(-1, stages), repeat=2):
        if s == t or (min(s, t) >= 0 and devices[s] == devices[t]):
            continue
        message, nbytes = np.zeros(count, dtype=bool), np.zeros(count)
        for value in problem.values:
            if s < 0:
                flows, size = (reads(value, t) if value.producer < 0 else np.zeros(count, dtype=bool)), value.nbytes
            elif t < 0:
                flows, size = has[s][value.producer] & value.returned if value.producer >= 0 else message & False, value.nbytes
            else:
                flows = has[s][value.producer] & reads(value, t) if value.producer >= 0 else message & False
                size = value.nbytes
            counted = traffic.multicast and min(s, t) >= 0
            message |= flows
            nbytes += flows * (0.0 if counted else size)
            if value.gradient and min(s, t) >= 0 and value.producer >= 0:
                back = has[t][value.producer] & reads(value, s)
                message |= back
                nbytes += back * (0.0 if counted else value.gradient)
        senders, readers = (devices[s] if s >= 0 else (-1,)), (devices[t] if t >= 0 else (-1,))
        samples = len(senders) * len(readers)
        for i in range(samples):
            a, b = senders[i % len(senders)], readers[i % len(readers)]
            link = problem.links.get((a, b), problem.link)
            if s >= 0:
                spent[s, a] += (message * link.latency + nbytes / link.bandwidth) * len(senders) / samples
            if t >= 0:
                spent[t, b] += (message * link.latency + traffic.receive * nbytes / link.bandwidth) * len(readers) / samples
    groups = list(dict.fromkeys(devices))
    once = np.zeros((len(groups), count))
    for value in problem.values if traffic.multicast else ():
        if value.producer < 0:
            continue
        b, g = value.nbytes / problem.link.bandwidth, value.gradient / problem.link.bandwidth
        in_group = [np.any([has[s][value.producer] for s in range(stages) if devices[s] == group], axis=0) for group in groups]
        read_in = [np.any([reads(value, s) for s in range(stages) if devices[s] == group], axis=0) for group in groups]
        for x in range(len(groups)):
            leaves = in_group[x] & np.any([read_in[y] for y in range(len(groups)) if y != x] + [in_group[x] & False], axis=0)
            enters = read_in[x] & ~in_group[x]
            once[x] += leaves * (b + traffic.receive * g) + enters * (traffic.receive * b + g)
    for s, group in enumerate(devices):
        single = []
        for d in group:
            costs = problem.places[d].cost or tuple(c / problem.places[d].speed for c in problem.cost)
            compute = sum((has[s][v] * costs[v] for v in range(problem.layers)), np.zeros(count))
            # Paid once per group: by its first stage, here; sums are what matters.
            extra = once[groups.index(group)] if devices.index(group) == s else 0.0
            transfer = (spent[s, d] + extra) * problem.places[d].copies
            busy[d] += compute / len(group)
            moving[d] += transfer / len(group)
            single.append(compute + transfer)
        latency += np.max(single, axis=0)
        flight = {"stream": 1, "gpipe": memory.micro_batches, "1f1b": min(memory.micro_batches, stages - s)}
        flying = math.ceil(flight[memory.schedule] / len(group))
        held = sum((has[s][v] * a for v, a in enumerate(problem.activations)), np.zeros(count)) * flying
        for value in problem.values:
            held = held + memory.slots * value.nbytes * (reads(value, s) & ~makes(value, s))
            if value.producer >= 0:
                outside = np.any(
                    [reads(value, t) for t in range(stages) if devices[t] != group] + [has[s][0] & False], axis=0
                )
                held = held + memory.slots * value.gradient * (has[s][value.producer] & outside)
        for d in group:
            used[d] += held
        for v in range(problem.layers):
            pinned = problem.allowed.get(v)
            if (pinned is not None and not set(group) <= set(pinned)) or (len(group) > 1 and v in problem.single):
                fine &= ~has[s][v]
    for weight in problem.weights:
        holds = np.array([
            np.any([has[s][v] for v in weight.users for s in range(stages) if d in devices[s]] + [fine & False], axis=0)
            for d in range(k)
        ])
        used += holds * weight.nbytes * memory.copies
        if memory.update_every:
            spread = holds.sum(axis=0) > 1
            each = 2 * weight.nbytes / problem.link.bandwidth / memory.update_every
            moving += holds * spread * each * np.array([[place.copies] for place in problem.places])
    load = np.maximum(busy + (1 - traffic.overlap) * moving, moving).max(axis=0)
    for d, place in enumerate(problem.places):
        fine &= used[d] <= place.memory * (1 + 1e-9)
    return load, latency, fine


def best_by_enumeration(problem: Problem) -> float:
    """The least objective over all monotone maps and all dealings of devices; infinite if there is none."""
    best, maps = INF, {}
    for devices in dealings(problem):
        stages = len(devices)
        if stages not in maps:
            maps[stages] = monotone_maps(problem, stages)
        if not len(maps[stages]):
            continue
        load, latency, fine = evaluate(problem, maps[stages], devices)
        goal, other = (load, latency) if problem.goal.kind == "throughput" else (latency, load)
        fine = fine & (other <= problem.goal.limit * (1 + 1e-9))
        best = min(best, float(goal[fine].min(initial=INF)))
    return best


def true_objective(problem: Problem, placement: Placement) -> tuple[float, bool]:
    """The objective of one placement, and whether it keeps every limit."""
    load, latency, fine = evaluate(problem, np.array([placement.stage_of], dtype=np.int8), placement.devices)
    goal, other = (load, latency) if problem.goal.kind == "throughput" else (latency, load)
    return float(goal[0]), bool(fine[0]) and float(other[0]) <= problem.goal.limit * (1 + 1e-9)


def chain_problem(rng: random.Random) -> Problem:
    n, k = rng.randint(12, 60), rng.randint(2, 8)
    cost = tuple(rng.expovariate(1.0) * 1e-3 for _ in range(n))
    values = [Value(-1, (0,), rng.randint(1, 10**6))]
    values += [Value(i, (i + 1,), rng.randint(1, 2 * 10**6)) for i in range(n - 1)]
    values += [Value(n - 1, (), rng.randint(1, 10**6), returned=True)]
    return Problem(cost, tuple((i, i + 1) for i in range(n - 1)), tuple(values), (Place(),) * k, Link(30e-6, 5e9))


def best_chain(problem: Problem) -> float:
    """Bisection over the answer; feasibility by reachable (position, stages used) pairs."""
    n, k = problem.layers, len(problem.places)
    size = {v.producer: v.nbytes for v in problem.values}
    sums = list(itertools.accumulate(problem.cost, initial=0.0))

    def load(i: int, j: int) -> float:
        return sums[j] - sums[i] + size[j - 1] / problem.link.bandwidth + 2 * problem.link.latency

    table = {(i, j): load(i, j) for i in range(n) for j in range(i + 1, n + 1)}

    def fits(limit: float) -> bool:
        reached = {0}
        for _ in range(k):
            reached = {j for i in reached for j in range(i + 1, n + 1) if table[i, j] <= limit}
        return n in reached

    candidates = sorted(set(table.values()))
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(candidates[middle]) else (middle + 1, high)
    return candidates[low]


__all__ = ["PlanError"]

whole = st.integers(0, 20).map(float)


@st.composite
def graphs(draw: st.DrawFn, n: int, training: bool) -> dict[str, Any]:
    """Random costs, edges and values: skips, several values a layer, user inputs, results, gradients."""
    cost = tuple(draw(st.lists(whole, min_size=n, max_size=n)))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=2 * n)) if pairs else []
    values = []
    for i in range(n):
        readers = tuple(j for p, j in edges if p == i)
        returned = draw(st.booleans()) if readers else i == n - 1
        gradient = draw(whole) if training else 0.0
        if readers and draw(st.booleans()):
            values.append(Value(i, readers[::2], draw(whole), gradient=gradient))
        if readers or returned:
            values.append(Value(i, readers, draw(whole), returned, gradient))
    hosts = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3))
    if hosts:
        values.append(Value(-1, tuple(sorted(hosts)), draw(whole)))
    return {"cost": cost, "edges": tuple(sorted(edges)), "values": tuple(values)}


@st.composite
def plain_problems(draw: st.DrawFn, most: int = 9) -> Problem:
    """Identical devices, every one to be used, no constraints: what ``compile()`` asks by default."""
    n = draw(st.integers(2, most))
    fields = draw(graphs(n, training=False))
    k = draw(st.integers(2, min(4, n)))
    speeds = draw(st.one_of(st.just([1.0] * k), st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=k, max_size=k)))
    link = Link(draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([1.0, 4.0, 1e9])))
    return Problem(**fields, places=tuple(Place(speed=speed) for speed in speeds), link=link)


@st.composite
def problems(draw: st.DrawFn, most: int = 8) -> Problem:
    """Everything at once: unlike devices and links, memory, pins, colocation, replicas, ties, chunks, goals."""
    n = draw(st.integers(2, most))
    training = draw(st.booleans())
    fields = draw(graphs(n, training))
    chunks = draw(st.sampled_from([1, 1, 1, 2])) if n >= 4 else 1
    k = draw(st.integers(1, min(4 if chunks == 1 else 2, n // chunks)))
    layers = st.integers(0, n - 1)
    rare = st.sampled_from([False, False, True])
    memory = Memory(
        copies=draw(st.sampled_from([1.0, 2.0])),
        schedule=draw(st.sampled_from(["stream", "gpipe", "1f1b"])),
        micro_batches=draw(st.integers(1, 3)),
        slots=draw(st.sampled_from([0.0, 1.0])),
        update_every=draw(st.sampled_from([1.0, 2.0])) if training else 0.0,
    )
    weights = draw(
        st.lists(st.builds(Weight, whole, st.lists(layers, min_size=1, max_size=3).map(tuple)), max_size=n)
    )
    limited = draw(st.booleans())
    places = []
    for d in range(k):
        own = tuple(draw(st.lists(whole, min_size=n, max_size=n))) if draw(rare) and draw(st.booleans()) else ()
        room = draw(st.sampled_from([30.0, 60.0, 120.0, 240.0])) if limited else INF
        speed = draw(st.sampled_from([1.0, 1.0, 0.5, 2.0]))
        places.append(Place(f"d{d}", speed, room, own, draw(st.sampled_from([1.0, 1.0, 0.0]))))
    link = Link(draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([1.0, 4.0, 1e9])))
    multicast = draw(st.booleans())
    links = {}
    if not multicast and k > 1 and draw(rare):
        ends = st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)).filter(lambda p: p[0] != p[1])
        links = draw(st.dictionaries(ends, st.sampled_from([Link(0.0, 1.0), Link(2.0, 8.0), Link(0.5, 1e9)]), max_size=4))
    allowed = draw(st.dictionaries(layers, st.sets(st.integers(0, k - 1), min_size=1).map(frozenset), max_size=2)) if draw(rare) else {}
    together = (tuple(draw(st.lists(layers, min_size=2, max_size=3, unique=True))),) if draw(rare) else ()
    replicas = chunks == 1 and draw(rare)
    kind = draw(st.sampled_from(["throughput", "throughput", "latency"]))
    return Problem(
        **fields,
        places=tuple(places),
        link=link,
        links=links,
        traffic=Traffic(multicast, draw(st.sampled_from([0.0, 1.0])), draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))),
        goal=Goal(kind, draw(st.sampled_from([INF, INF, 40.0, 100.0]))),
        memory=memory,
        weights=tuple(weights),
        activations=tuple(draw(st.lists(whole, min_size=n, max_size=n))) if draw(st.booleans()) else (),
        allowed=allowed,
        together=together,
        single=frozenset(draw(st.sets(layers, max_size=2))) if replicas else frozenset(),
        chunks=chunks,
        replicas=replicas,
        idle=chunks == 1 and draw(rare),
    )


def diamond() -> Problem:
    """Two branches whose best cut is consecutive in no simple order of the layers.

    Equal halves need layer 2 with layer 3 and layer 1 with layer 4, any order being allowed.
    """
    cost = (1.0, 5.0, 4.0, 3.0, 2.0, 6.0, 7.0, 1.0)
    edges = ((0, 1), (0, 2), (0, 3), (1, 7), (2, 7), (3, 7), (4, 7), (5, 7), (6, 7))
    return Problem(cost, edges, (), (Place(),) * 3, Link(0.0, 1e9))


def gpt_like(layers: int, seed: int = 0, stages: int = 8) -> Problem:
    """Blocks of twelve ops with residual skips; two embeddings read user inputs; one mask read by all blocks."""
    rng = random.Random(seed)
    cost, edges, reads = [2e-4, 5e-5], [], {0: set(), 1: set()}
    stream, mask = 0, 1
    while len(cost) + 12 < layers:
        start = len(cost)
        for offset in range(12):
            at = len(cost)
            cost.append(rng.choice([2e-5, 5e-5, 8e-4, 1.5e-3]) * rng.uniform(0.9, 1.1))
            sources = {start + offset - 1} if offset else {stream}
            if offset == 4:
                sources.add(mask)
            if offset == 6:
                sources.add(stream)
            if offset == 11:
                sources.add(start + 6)
            for source in sources:
                edges.append((source, at))
                reads.setdefault(source, set()).add(at)
        stream = len(cost) - 1
    while len(cost) < layers:
        edges.append((len(cost) - 1, len(cost)))
        reads.setdefault(len(cost) - 1, set()).add(len(cost))
        cost.append(1e-4)
    values = [Value(p, tuple(sorted(c)), 3e6 if p != mask else 1e5) for p, c in reads.items() if c]
    values += [Value(-1, (0, 1), 8e3), Value(layers - 1, (), 4e6, returned=True)]
    return Problem(tuple(cost), tuple(sorted(edges)), tuple(values), (Place(),) * stages)


def with_places(problem: Problem, count: int) -> Problem:
    return replace(problem, places=(Place(),) * count)
