"""Learning on a stream: every sample goes forward, back, and updates, while later ones are under way.

Three stages, five samples; a forward and a backward take one tick each, an update none. ``1f1b``
(PipeDream; Narayanan et al. 2019)::

    dev 0 0F0 0F1 0F2   .   . 0B0 0F3 0B1 0F4 0B2   . 0B3   . 0B4
    dev 1   . 1F0 1F1   . 1B0 1F2 1B1 1F3 1B2 1F4 1B3   . 1B4   .
    dev 2   .   . 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2F4 2B4   .   .
         |   warm-up  |     steady state        |    drain    |

Stage ``s`` does ``S - 1 - s`` forwards, then a forward, a backward and an update in turn. The forward
of sample ``k`` thus comes right after the backward of ``k - (S - 1 - s) - 1``.

``lockstep`` (PARTIME; Meloni et al. 2022): in tick ``t`` stage ``s`` does the forward of sample ``t - s``
and the backward of ``t - 2(S - 1) + s``, so it is ``2(S - 1 - s)`` forwards ahead::

    tick       0        1        2        3        4        5        6        7        8
    dev 0    0F0      0F1      0F2      0F3  0F4 0B0      0B1      0B2      0B3      0B4
    dev 1             1F0      1F1  1F2 1B0  1F3 1B1  1F4 1B2      1B3      1B4
    dev 2                  2F0 2B0  2F1 2B1  2F2 2B2  2F3 2B3  2F4 2B4

It costs twice the delay and brings nothing but equality with PARTIME: nobody keeps the clock here,
each stage waits for what it needs. ``sync``, with four samples an update, is 1F1B with a flush::

    dev 0 0F0 0F1 0F2   .   . 0B0 0F3 0B1   . 0B2   . 0B3 0F4 0F5   .   .   . 0B4   . 0B5
    dev 1   . 1F0 1F1   . 1B0 1F2 1B1 1F3 1B2   . 1B3   .   . 1F4 1F5   . 1B4   . 1B5   .
    dev 2   .   . 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3   .   .   .   . 2F4 2B4 2F5 2B5   .   .
"""

from __future__ import annotations

from pipecompile.errors import PlanError
from pipecompile.ir.learning import Rule
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import DeviceProgram, Instruction, Op, Program


def learning(plan: Plan, rule: Rule) -> Program:
    """What each device computes in a stream without end: F, BW and STEP. One stage a device.

    Raises:
        PlanError: if a device has two stages, or too few samples make one update.
    """
    stages = len(plan.stages)
    if len({stage.device for stage in plan.stages}) < stages or any(stage.replicas for stage in plan.stages):
        raise PlanError("learning takes one stage a device, and one device a stage")
    least = rule.ahead(0, stages) + (rule.clock == "1f1b") if rule.updates == "2bw" and stages > 1 else 1
    if rule.accumulate < least:
        raise PlanError(
            f"accumulate={rule.accumulate}: updates={rule.updates!r} with clock={rule.clock!r} makes one update of "
            f"{least} samples or more on {stages} stages, else its two versions of the weights would not be enough"
        )
    devices = (_device(stage.device, stage.index, rule.ahead(stage.index, stages), rule) for stage in plan.stages)
    return Program(tuple(devices), (), f"{rule.updates} {rule.clock}")


def _device(device: int, stage: int, ahead: int, rule: Rule) -> DeviceProgram:
    def step(op: Op, sample: int) -> Instruction:
        return Instruction(op, stage, sample)

    first = [step(Op.FORWARD, i) for i in range(ahead)]
    body: list[Instruction] = []
    if rule.updates == "sync":  # every group of samples begins with the weights of the last update
        body, first = first, body
    for i in range(rule.accumulate):
        if rule.updates != "sync" or i + ahead < rule.accumulate:
            body.append(step(Op.FORWARD, i + ahead))
        body.append(step(Op.BACKWARD, i))
    body.append(step(Op.STEP, 0))
    return DeviceProgram(device, (stage,), tuple(first), tuple(body), turn=rule.accumulate)


__all__ = ["learning"]
