"""ZB-V: no bubble, two stages a device in a V (Qi et al. 2024, https://arxiv.org/abs/2405.15362 and 2401.10241).

Two devices (stages 0, 3 and 1, 2), four micro-batches; F, B and W take one tick each::

    dev 0 0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0F3 0B0 0W0 3F2 3B2 3W2 0B1 0W1 3F3 3B3 3W3 0B2 0W2 0B3 0W3   .
    dev 1   . 1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1F3 1B1 1W1 2F3 2B2 2W2 1B2 2B3 1B3 1W2 2W3 1W3

The model goes down the devices and back up, so the first device also has the last stage, and the
backward of a micro-batch begins where its forward began. Once it has begun, no device ever waits
when F, B and W take equally long and ``m >= 2p``; it keeps ``2p`` activations of half a device's
share each, as 1F1B's first stage does. With the first and last layer on one device, a weight tied
between them needs no message.
"""

from __future__ import annotations

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Op, Program
from pipecompile.schedules.step import B, F, Order, W, closed, devices_of, vee, wanted


def zb_v(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. Stages ``d`` and ``2p - 1 - d`` on device ``d``.

    Raises:
        PlanError: if the plan places stages otherwise, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "zb_v")
    devices = len(stages)
    wanted(stages, [vee(d, devices) for d in range(devices)], "zb_v")
    # The phases below need 2p micro-batches; of a smaller step the surplus is left out.
    count = max(micro_batches, 2 * devices)

    def order(device: int, down: int, up: int) -> list[Instruction]:
        made = Order()

        def turn(times: int, *work: tuple[Op, int]) -> None:
            for _ in range(times):
                for op, stage in work:
                    made.add(op, stage)

        turn(2 * (devices - device) - 1, (F, down))
        turn(device, (F, up), (F, down))
        turn(devices - device, (F, up), (B, up), (W, up))
        while made.done(F, up) < count:
            if made.done(F, down) < count:
                made.add(F, down)
            turn(1, (B, down), (W, down), (F, up), (B, up), (W, up))
        turn(device, (B, down), (B, up))
        turn(devices - device, (B, down), (W, down))
        turn(count - made.done(W, up), (W, up))
        turn(count - made.done(W, down), (W, down))
        return [step for step in made.steps if step.sample < micro_batches]

    return closed("zb_v", stages, (order(device, *own) for device, own in enumerate(stages)))


__all__ = ["zb_v"]
