"""The stream schedule: every stage computes every sample, in order, as soon as it can.

Three stages, six samples; a row is a stage, a column the time in which one stage computes one
sample, a number the sample computed then::

    tick       0   1   2   3   4   5   6   7
    stage 0    0   1   2   3   4   5   .   .
    stage 1    .   0   1   2   3   4   5   .
    stage 2    .   .   0   1   2   3   4   5
              |warm-up|  steady state |drain |

Nobody keeps this clock. A device repeats one step, ``sF{i}``, and waits for its inputs, so the
table fills itself: stage ``s`` sits idle for the first ``s`` ticks because nothing has reached it
yet, then works without a gap, and has nothing left to do in the last ``stages - 1 - s`` ticks.
With stages of unequal length the columns stretch to the longest of them.
"""

from __future__ import annotations

from collections import defaultdict

from pipecompile.errors import PlanError
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.program import DeviceProgram, Instruction, Op, Program


def stream(plan: Plan) -> Program:
    """What each device computes in a stream without end. No edges and no messages yet.

    A device's body computes the sample at hand in each of its stages, in pipeline order. Where a
    stage is on several devices, each has the body, for its own samples.

    Raises:
        PlanError: if a replica of a stage shares its device with another stage.
    """
    stages: defaultdict[int, list[Stage]] = defaultdict(list)
    for stage in sorted(plan.stages, key=lambda stage: stage.index):
        for device in stage.devices:
            stages[device].append(stage)
    devices: list[DeviceProgram] = []
    for device, own in sorted(stages.items()):
        copies = own[0].devices
        if len(own) > 1 and any(stage.replicas for stage in own):
            numbers = ", ".join(str(stage.index) for stage in own)
            raise PlanError(f"device {device} runs stages {numbers}, and one is replicated: give replicas own devices")
        body = tuple(Instruction(Op.FORWARD, stage.index, 0) for stage in own)
        indices = tuple(stage.index for stage in own)
        devices.append(
            DeviceProgram(device, indices, (), body, replica=copies.index(device), replicas=len(copies))
            if len(own) == 1
            else DeviceProgram(device, indices, (), body)
        )
    return Program(tuple(devices), (), "stream")


__all__ = ["stream"]
