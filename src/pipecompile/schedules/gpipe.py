"""GPipe: all forwards, then all backwards (Huang et al. 2019, https://arxiv.org/abs/1811.06965).

Three stages, four micro-batches; a forward takes one tick, a whole backward two (``~`` its second half)::

    dev 0 0F0 0F1 0F2 0F3   .   .   .   .   .   . 0B0   ~ 0B1   ~ 0B2   ~ 0B3   ~
    dev 1   . 1F0 1F1 1F2 1F3   .   .   . 1B0   ~ 1B1   ~ 1B2   ~ 1B3   ~   .   .
    dev 2   .   . 2F0 2F1 2F2 2F3 2B0   ~ 2B1   ~ 2B2   ~ 2B3   ~   .   .   .   .

Each device idles for ``p - 1`` of ``m + p - 1`` slots and keeps the activations of all ``m``
micro-batches. The paper runs the backwards last to first; here they go first to last, which takes
as long and sums gradients in the order plain PyTorch would.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedules.step import BW, F, Order, closed, devices_of, loop, wanted


def gpipe(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. One stage a device.

    Raises:
        PlanError: if the plan has more than one stage on a device, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "gpipe")
    wanted(stages, [loop(d, len(stages), 1) for d in range(len(stages))], "gpipe")

    def order(stage: int) -> list[Instruction]:
        made = Order()
        for op in (F, BW):
            for _ in range(micro_batches):
                made.add(op, stage)
        return made.steps

    return closed("gpipe", stages, (order(stage) for (stage,) in stages))


__all__ = ["gpipe"]
