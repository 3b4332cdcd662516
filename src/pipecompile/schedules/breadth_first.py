"""Breadth-first, looped: each stage takes all micro-batches at once (Lamy-Poirier 2022, https://arxiv.org/abs/2211.05953).

Two devices with two stages each, four micro-batches; a forward takes one tick, a backward two::

    dev 0 0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3   .   .   . 2B0   ~ 2B1   ~ 2B2   ~ 2B3   ~ 0B0   ~ 0B1   ~ 0B2   ~ 0B3   ~
    dev 1   . 1F0 1F1 1F2 1F3 3F0 3F1 3F2 3F3 3B0   ~ 3B1   ~ 3B2   ~ 3B3   ~ 1B0   ~ 1B1   ~ 1B2   ~ 1B3   ~   .   .

The model goes round the devices ``v`` times, so that a device waits only for a ``v``-th of the
model: its bubble is ``(p - 1) / (v m)`` of the time it works, for ``m >= p``. All activations of
the step are kept, as in GPipe; in return a stage's weights are used for all micro-batches in a
row (one gather, one reduction where weights are sharded).
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedules.step import BW, F, Order, closed, devices_of, loop, wanted


def breadth_first(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. ``v`` stages a device: ``d``, ``d + p``, ``d + 2p``, ...

    Raises:
        PlanError: if the plan places stages otherwise, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "breadth_first")
    wanted(stages, [loop(d, len(stages), len(stages[d])) for d in range(len(stages))], "breadth_first")

    def order(own: tuple[int, ...]) -> list[Instruction]:
        made = Order()
        for op, turn in ((F, own), (BW, reversed(own))):
            for stage in turn:
                for _ in range(micro_batches):
                    made.add(op, stage)
        return made.steps

    return closed("breadth_first", stages, (order(own) for own in stages))


__all__ = ["breadth_first"]
