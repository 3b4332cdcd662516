"""ZB-H1: weight gradients fill the bubble of 1F1B (Qi et al. 2023, https://arxiv.org/abs/2401.10241).

Three stages, four micro-batches; F, B (gradient of the inputs) and W (of the weights) take one tick each::

    dev 0 0F0 0F1 0F2   .   . 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3
    dev 1   . 1F0 1F1   . 1B0 1F2 1B1 1W0 1F3 1B2 1W1 1B3 1W2 1W3
    dev 2   .   . 2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3

Only B is what the stage before waits for, so a stage sends it first and does W later. Stage ``s``
warms up as in 1F1B, then runs F, B and the W of ``s`` micro-batches ago; the last ``s`` W's come
when there is nothing else left. The bubble shrinks from ``(p - 1)(F + B + W)`` to
``(p - 1)(F + B - W)``, and no stage keeps more than ``p`` micro-batches, as many as the first one in 1F1B.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedules.step import B, F, Order, W, closed, devices_of, loop, wanted


def zb_h1(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. One stage a device.

    Raises:
        PlanError: if the plan has more than one stage on a device, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "zb_h1")
    wanted(stages, [loop(d, len(stages), 1) for d in range(len(stages))], "zb_h1")

    def order(stage: int) -> list[Instruction]:
        made = Order()
        for _ in range(min(micro_batches, len(stages) - 1 - stage)):
            made.add(F, stage)
        for done in range(micro_batches):
            if made.done(F, stage) < micro_batches:
                made.add(F, stage)
            made.add(B, stage)
            if done >= stage:
                made.add(W, stage)
        while made.done(W, stage) < micro_batches:
            made.add(W, stage)
        return made.steps

    return closed("zb_h1", stages, (order(stage) for (stage,) in stages))


__all__ = ["zb_h1"]
