"""What an assignment costs: the one function that every candidate plan is judged by.

It shares no code with the models the solvers work on. Those may simplify (the chain DP counts a
value once however many stages read it, and one edge per side), therefore each candidate is
evaluated here again, and the best by this measure is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipecompile.passes.partition.problem import HOST, Problem


def stage_loads(problem: Problem, assignment: Sequence[int]) -> list[tuple[float, float]]:
    """Seconds each stage computes and spends on transfers, per sample: ``[(compute, transfer)]``.

    There is one edge (one ring, one message a sample) for each pair of stages between which values
    cross, the caller counting as a stage. The sender copies: it pays the link's latency for each
    outgoing edge and bytes / bandwidth for each value on it, so a value read in three stages is
    paid three times. The receiver reads in place: it pays the latency of each incoming edge. The
    caller's own time is not counted.
    """
    compute = [0.0] * problem.stages
    for cost, stage in zip(problem.cost, assignment, strict=True):
        compute[stage] += cost / problem.speeds[stage]

    messages: dict[tuple[int, int], float] = defaultdict(float)
    for value in problem.values:
        source = HOST if value.producer == HOST else assignment[value.producer]
        targets = {assignment[layer] for layer in value.consumers}
        if value.returned:
            targets.add(HOST)
        for target in targets - {source}:
            messages[source, target] += value.nbytes

    transfer = [0.0] * problem.stages
    for (source, target), nbytes in messages.items():
        if source != HOST:
            transfer[source] += problem.link.latency + nbytes / problem.link.bandwidth
        if target != HOST:
            transfer[target] += problem.link.latency
    return list(zip(compute, transfer, strict=True))


def largest(loads: Sequence[tuple[float, float]]) -> float:
    """The objective: busy seconds per sample of the busiest stage."""
    return max((compute + transfer for compute, transfer in loads), default=0.0)


def moved(loads: Sequence[tuple[float, float]]) -> float:
    """Seconds all stages spend on transfers: decides between plans of equal objective."""
    return sum(transfer for _, transfer in loads)


__all__ = ["largest", "moved", "stage_loads"]
