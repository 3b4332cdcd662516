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

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import DeviceProgram, Instruction, Op, Program


def stream(plan: Plan) -> Program:
    """What each device computes in a stream without end. No edges and no messages yet.

    A device's body computes the sample at hand in each of its stages, in pipeline order.
    """
    stages: defaultdict[int, list[int]] = defaultdict(list)
    for stage in sorted(plan.stages, key=lambda stage: stage.index):
        stages[stage.device].append(stage.index)
    devices = tuple(
        DeviceProgram(device, tuple(own), (), tuple(Instruction(Op.FORWARD, stage, 0) for stage in own))
        for device, own in sorted(stages.items())
    )
    return Program(devices, (), "stream")


__all__ = ["stream"]
