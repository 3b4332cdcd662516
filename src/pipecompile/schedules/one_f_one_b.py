"""1F1B: a backward as soon as there is one (PipeDream-flush; Narayanan et al. 2021, https://arxiv.org/abs/2006.09503).

Three stages, four micro-batches; a forward takes one tick, a whole backward two (``~`` its second half)::

    dev 0 0F0 0F1 0F2   .   .   .   . 0B0   ~ 0F3 0B1   ~   . 0B2   ~   . 0B3   ~
    dev 1   . 1F0 1F1   .   . 1B0   ~ 1F2 1B1   ~ 1F3 1B2   ~   . 1B3   ~   .   .
    dev 2   .   . 2F0 2B0   ~ 2F1 2B1   ~ 2F2 2B2   ~ 2F3 2B3   ~   .   .   .   .

A stage runs ``p - 1 - s`` forwards to warm up, then one forward and one backward in turn. The
bubble is that of GPipe, ``p - 1`` of ``m + p - 1`` slots; but stage ``s`` never keeps the
activations of more than ``p - s`` micro-batches, however many there are.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedules.step import BW, F, Order, closed, devices_of, loop, wanted


def one_f_one_b(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. One stage a device.

    Raises:
        PlanError: if the plan has more than one stage on a device, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "1f1b")
    wanted(stages, [loop(d, len(stages), 1) for d in range(len(stages))], "1f1b")

    def order(stage: int) -> list[Instruction]:
        made = Order()
        for _ in range(min(micro_batches, len(stages) - 1 - stage)):
            made.add(F, stage)
        while made.done(BW, stage) < micro_batches:
            if made.done(F, stage) < micro_batches:
                made.add(F, stage)
            made.add(BW, stage)
        return made.steps

    return closed("1f1b", stages, (order(stage) for (stage,) in stages))


__all__ = ["one_f_one_b"]
