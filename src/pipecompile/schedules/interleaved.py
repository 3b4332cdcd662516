"""Interleaved 1F1B: 1F1B over several stages a device (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473).

Two devices with two stages each, four micro-batches; a forward takes one tick, a backward two::

    dev 0 0F0 0F1 2F0 2F1 0F2   . 2B0   ~ 0F3 2B1   ~ 2F2 0B0   ~ 2F3 0B1   ~   . 2B2   ~   . 2B3   ~ 0B2   ~ 0B3   ~
    dev 1   . 1F0 1F1 3F0 3B0   ~ 3F1 3B1   ~ 1F2 1B0   ~ 1F3 1B1   ~ 3F2 3B2   ~ 3F3 3B3   ~ 1B2   ~ 1B3   ~   .   .

The model goes round the ``p`` devices ``v`` times. Micro-batches go in groups of ``p``: a device
takes a group through each of its stages before the next group. It warms up with
``2 (p - 1 - d) + (v - 1) p`` forwards, then does one forward and one backward in turn. Where
``p`` divides ``m`` the bubble is ``(p - 1) / (v m)`` of the time worked, ``v`` times less than in
1F1B, for one more activation than the warm-up has forwards (each of a ``v``-th of the model) and
``v`` times the messages. Where ``p`` does not divide ``m``, the order is that of the next multiple
without the micro-batches that are not there.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Program
from pipecompile.schedules.step import BW, F, Order, closed, devices_of, loop, wanted


def interleaved(plan: Plan, micro_batches: int) -> Program:
    """What each device computes in one step. ``v`` stages a device: ``d``, ``d + p``, ``d + 2p``, ...

    Raises:
        PlanError: if the plan places stages otherwise, or ``micro_batches`` is below one.
    """
    stages = devices_of(plan, micro_batches, "interleaved")
    devices = len(stages)
    wanted(stages, [loop(d, devices, len(stages[d])) for d in range(devices)], "interleaved")
    groups = -(-micro_batches // devices)

    def turns(own: Iterable[int]) -> list[int]:
        """The stages in the order in which a device takes all micro-batches through them."""
        own = list(own)
        return [stage for _ in range(groups) for stage in own for _ in range(devices)]

    def order(device: int, own: tuple[int, ...]) -> list[Instruction]:
        made, forward, backward = Order(), turns(own), turns(reversed(own))
        warm_up = min(len(forward), 2 * (devices - 1 - device) + (len(own) - 1) * devices)
        for stage in forward[:warm_up]:
            made.add(F, stage)
        for i, stage in enumerate(backward):
            if warm_up + i < len(forward):
                made.add(F, forward[warm_up + i])
            made.add(BW, stage)
        return [step for step in made.steps if step.sample < micro_batches]

    return closed("interleaved", stages, (order(device, own) for device, own in enumerate(stages)))


__all__ = ["interleaved"]
