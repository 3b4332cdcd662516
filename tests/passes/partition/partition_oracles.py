"""Independent judges of partitions, and generators of problems. Shares no code with the solvers."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Problem, Value


def true_load(problem: Problem, stage_of: tuple[int, ...]) -> float:
    """Largest load, by asking of every stage what it computes, whom it writes to, whom it reads from."""
    worst = 0.0
    for stage in range(problem.stages):
        busy = sum(c for c, s in zip(problem.cost, stage_of, strict=True) if s == stage) / problem.speeds[stage]
        to, came = set(), set()
        for value in problem.values:
            made = None if value.producer < 0 else stage_of[value.producer]
            read = {stage_of[layer] for layer in value.consumers}
            if made == stage:
                others = sorted(read - {stage}) + (["caller"] if value.returned else [])
                busy += len(others) * value.nbytes / problem.link.bandwidth
                to |= set(others)
            elif stage in read:
                came.add("caller" if made is None else made)
        worst = max(worst, busy + problem.link.latency * (len(to) + len(came)))
    return worst


def best_by_enumeration(problem: Problem) -> float:
    """Least largest load over all monotone maps onto the stages."""
    maps = itertools.product(range(problem.stages), repeat=problem.layers)
    feasible = (m for m in maps if len(set(m)) == problem.stages and all(m[i] <= m[j] for i, j in problem.edges))
    return min(true_load(problem, m) for m in feasible)


def chain_problem(rng: random.Random) -> Problem:
    n, k = rng.randint(12, 60), rng.randint(2, 8)
    cost = tuple(rng.expovariate(1.0) * 1e-3 for _ in range(n))
    values = [Value(-1, (0,), rng.randint(1, 10**6))]
    values += [Value(i, (i + 1,), rng.randint(1, 2 * 10**6)) for i in range(n - 1)]
    values += [Value(n - 1, (), rng.randint(1, 10**6), returned=True)]
    return Problem(cost, tuple((i, i + 1) for i in range(n - 1)), tuple(values), Link(30e-6, 5e9), k)


def best_chain(problem: Problem) -> float:
    """Bisection over the answer; feasibility by reachable (position, stages used) pairs."""
    n, k = problem.layers, problem.stages
    size = {v.producer: v.nbytes for v in problem.values}

    def load(i: int, j: int) -> float:
        return sum(problem.cost[i:j]) + size[j - 1] / problem.link.bandwidth + 2 * problem.link.latency

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


@st.composite
def problems(draw: st.DrawFn, most: int = 9) -> Problem:
    """Random graphs with skips, several values a layer, user inputs, results and unlike speeds."""
    n = draw(st.integers(2, most))
    k = draw(st.integers(2, min(4, n)))
    whole = st.integers(0, 20)
    cost = tuple(float(c) for c in draw(st.lists(whole, min_size=n, max_size=n)))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=2 * n))
    values = []
    for i in range(n):
        readers = tuple(j for p, j in edges if p == i)
        returned = draw(st.booleans()) if readers else i == n - 1
        if readers and draw(st.booleans()):
            values.append(Value(i, readers[::2], float(draw(whole))))
        if readers or returned:
            values.append(Value(i, readers, float(draw(whole)), returned))
    hosts = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3))
    if hosts:
        values.append(Value(-1, tuple(sorted(hosts)), float(draw(whole))))
    speeds = tuple(draw(st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=k, max_size=k)))
    if draw(st.booleans()):
        speeds = ()
    link = Link(draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([1.0, 4.0, 1e9])))
    return Problem(cost, tuple(sorted(edges)), tuple(values), link, k, speeds)


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
    return Problem(tuple(cost), tuple(sorted(edges)), tuple(values), Link(), stages)
