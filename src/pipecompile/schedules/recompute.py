"""Activation recomputation (Huang et al. 2019, GPipe): keep what a stage received, compute the rest again.

Two stages, three micro-batches under 1F1B, the first stage recomputed; ``R`` takes a tick as ``F`` does::

    dev 0 0F0 0F1 0R0   . 0B0   ~ 0F2 0R1 0B1   ~ 0R2 0B2   ~
    dev 1   . 1F0 1B0   ~ 1F1 1B1   ~ 1F2 1B2   ~   .   .   .

``R`` needs nothing but what the stage received, so it comes before the wait for gradients, where a
bubble may be. The stage that computes the loss needs no second forward: nobody waits for its
first one, which moves to right before its backward.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from pipecompile.ir.program import Instruction, Op, Program

RecomputeName = Literal["none", "stage", "auto"]

_BACKWARD = (Op.BACKWARD, Op.BACKWARD_INPUT)


def recompute(program: Program, stages: Collection[int], loss: int | None) -> Program:
    """The compute-only program with ``R`` before the backward of ``stages``.

    ``loss`` is the stage that computes the loss, None where that is not a stage's work.
    """

    def changed(steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        made: list[Instruction] = []
        for step in steps:
            moves = step.stage == loss and loss in stages
            if step.op in _BACKWARD and step.stage in stages:
                op = Op.FORWARD if moves else Op.RECOMPUTE
                made.append(Instruction(op, step.stage, step.sample))
            if not (moves and step.op is Op.FORWARD):
                made.append(step)
        return tuple(made)

    devices = tuple(replace(device, warm_up=changed(device.warm_up)) for device in program.devices)
    return replace(program, devices=devices)


def recomputed(program: Program) -> frozenset[int]:
    """The stages that compute their forward twice."""
    return frozenset(s.stage for device in program.devices for s in device.warm_up if s.op is Op.RECOMPUTE)


__all__ = ["RecomputeName", "recompute", "recomputed"]
