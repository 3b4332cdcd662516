"""Why a problem has no solution: which constraint cannot be met, and by how much."""

from __future__ import annotations

from math import inf, isfinite

import networkx as nx

from pipecompile.passes.partition.problem import Problem


def explain(problem: Problem, short: float, proved: bool) -> str:
    """The first of the constraints that cannot be met, in words.

    ``short`` is the least excess of memory in bytes of any pipeline looked at (infinite if none);
    ``proved``: those were all.
    """
    return _pins(problem) or _unused(problem) or _memory(problem, short, proved) or _limit(problem) or (
        "no plan meets all constraints at once (pins, memory, devices)" if proved else
        "no plan was found within the time limit: allow more time, or loosen pins, memory or the number of devices"
    )  # fmt: skip


def _pins(problem: Problem) -> str:
    """Layers pinned to two devices in turn, each of which would have to come before the other."""
    if problem.chunks > 1:
        return ""
    order: nx.DiGraph[int] = nx.DiGraph()
    witness: dict[tuple[int, int], tuple[int, int]] = {}
    pinned = {layer: next(iter(wanted)) for layer, wanted in problem.allowed.items() if len(wanted) == 1}
    for early, a in pinned.items():
        for late, b in pinned.items():
            if a != b and problem.ancestors[late, early]:
                order.add_edge(a, b)
                witness[a, b] = (early, late)
    try:
        cycle = nx.find_cycle(order)
    except nx.NetworkXNoCycle:
        return ""
    parts = [
        f"{problem.name(witness[a, b][0])} on {_device(problem, a)} must come before "
        f"{problem.name(witness[a, b][1])} on {_device(problem, b)}"
        for a, b in cycle
    ]
    return f"the pins contradict each other: {', and '.join(parts)}; a device has one stage, so it cannot come twice"


def _unused(problem: Problem) -> str:
    """A device that must be used and that no layer may run on."""
    if problem.idle or len(problem.allowed) < problem.layers:
        return ""
    for device in range(len(problem.places)):
        if not any(device in wanted for wanted in problem.allowed.values()):
            return (
                f"every layer is pinned to other devices than {_device(problem, device)}, which would be left "
                "without one: pin fewer layers, or plan for fewer devices"
            )
    return ""


def _memory(problem: Problem, short: float, proved: bool) -> str:
    if not problem.limited:
        return ""
    memory = problem.memory
    room = max(place.memory for place in problem.places)
    own = [0.0] * problem.layers
    for weight in problem.weights:
        for layer in set(weight.users):
            own[layer] += weight.nbytes * memory.copies
    for layer, nbytes in enumerate(problem.activations):
        own[layer] += nbytes
    largest = max(range(problem.layers), key=own.__getitem__, default=0)
    if own and own[largest] > room:
        return (
            f"{problem.name(largest)} alone needs {own[largest]:,.0f} bytes, {own[largest] - room:,.0f} more than "
            f"the largest device has ({room:,.0f})"
        )
    whole = sum(weight.nbytes for weight in problem.weights) * memory.copies + sum(problem.activations)
    there = sum(place.memory for place in problem.places)
    if whole > there and not problem.replicas:
        return (
            f"the model needs {whole:,.0f} bytes, {whole - there:,.0f} more than all devices have together "
            f"({there:,.0f})"
        )
    if isfinite(short) and short > 0:
        how = "no plan fits" if proved else "no plan was found that fits"
        return f"{how} the devices' memory: the best one exceeds it by {short:,.0f} bytes on one device"
    return ""


def _limit(problem: Problem) -> str:
    """A limit on latency or load that no plan keeps: found by asking for the least."""
    from dataclasses import replace

    from pipecompile.errors import PlanError
    from pipecompile.passes.partition.problem import Goal
    from pipecompile.passes.partition.search import solve

    goal = problem.goal
    if goal.limit == inf:
        return ""
    other = "latency" if goal.kind == "throughput" else "throughput"
    try:
        least = solve(replace(problem, goal=Goal(other)), time_limit=2.0).objective
    except PlanError:
        return ""
    what = "latency" if other == "latency" else "time per sample"
    return (
        f"no plan has a {what} of at most {goal.limit:.6g} s: the least is {least:.6g} s, "
        f"{least - goal.limit:.3g} s more"
    )


def _device(problem: Problem, device: int) -> str:
    return problem.places[device].name or f"device {device}"


__all__ = ["explain"]
