"""Run a stream that is learned from on paper: the program that verify and codegen read too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.program import HOST, Instruction, Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost
from pipecompile.simulate.step import simulate_step

_FREE = Link(0.0, float("inf"))


def simulate_learn(
    program: Program,
    costs: Sequence[StageCost],
    samples: int,
    link: Link = _FREE,
    *,
    cluster: Cluster | None = None,
    throttle: Mapping[str, Link] | None = None,
) -> Timeline:
    """Predict when each device does what in a stream of so many samples; the caller takes results at once.

    Args:
        program: an open program of forwards, backwards and updates, with its edges or without.
        costs: per stage what its work takes, the update included.
        samples: how many.
        link: what a message costs the device at either end.
        cluster: the cores of the devices; without it each device has its own.
        throttle: edge name -> a slower link that delivers one message at a time.

    Returns:
        A timeline whose finishes are the ends of the last stage's forwards, latencies from the first's begin.

    Raises:
        ProgramError: if the program comes to a halt before its end.
    """
    results = {edge.name for edge in program.edges if edge.target == HOST}

    def own(order: Sequence[Instruction]) -> tuple[Instruction, ...]:
        return tuple(step for step in order if step.edge not in results)

    devices = tuple(
        replace(device, warm_up=own(order), body=(), drain=(), turn=1)
        for device, order in zip(program.devices, program.unroll(samples), strict=True)
    )
    edges = tuple(edge for edge in program.edges if edge.name not in results)
    timeline = simulate_step(Program(devices, edges, program.schedule), costs, link, cluster=cluster, throttle=throttle)
    forwards = [event for event in timeline.events if event.activity == "F"]
    begun = {event.sample: event.start for event in forwards if event.stage == 0}
    done = {event.sample: event.end for event in forwards if event.stage == len(program.devices) - 1}
    return replace(
        timeline,
        finishes=tuple(done[i] for i in sorted(done)),
        latencies=tuple(done[i] - begun[i] for i in sorted(done)),
    )


__all__ = ["simulate_learn"]
