"""What the schedules of a training step share: who runs which stages, and the order as a Program.

A step is closed: every stage computes ``F``, ``B`` and ``W`` (or ``BW``) once for each of ``m``
micro-batches, each kind in the order of the micro-batches, so that gradients are summed in the
order in which plain PyTorch would sum them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipecompile.errors import PlanError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import DeviceProgram, Instruction, Op, Program

F, B, W, BW = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT, Op.BACKWARD


class Order:
    """Collects the instructions of one device; each call takes the next micro-batch of its stage."""

    def __init__(self) -> None:
        self.steps: list[Instruction] = []
        self._next: dict[tuple[Op, int], int] = {}

    def add(self, op: Op, stage: int) -> None:
        """Let ``stage`` do ``op`` on the first micro-batch it has not yet done it on."""
        sample = self._next.get((op, stage), 0)
        self._next[op, stage] = sample + 1
        self.steps.append(Instruction(op, stage, sample))

    def done(self, op: Op, stage: int) -> int:
        """How many micro-batches ``stage`` has done ``op`` on."""
        return self._next.get((op, stage), 0)


def loop(device: int, devices: int, chunks: int) -> tuple[int, ...]:
    """Stages of a device when the model goes round all devices ``chunks`` times."""
    return tuple(device + chunk * devices for chunk in range(chunks))


def vee(device: int, devices: int) -> tuple[int, ...]:
    """Stages of a device when the model goes down all devices and back up, in the shape of a V."""
    return (device, 2 * devices - 1 - device)


def devices_of(plan: Plan, micro_batches: int, name: str) -> list[tuple[int, ...]]:
    """Per device its stages in pipeline order.

    Raises:
        PlanError: if there are no micro-batches, or devices have different numbers of stages.
    """
    if micro_batches < 1:
        raise PlanError(f"micro_batches={micro_batches}: a training step needs at least one micro-batch")
    found: dict[int, list[int]] = {}
    for stage in sorted(plan.stages, key=lambda stage: stage.index):
        found.setdefault(stage.device, []).append(stage.index)
    stages = [tuple(own) for _, own in sorted(found.items())]
    if len({len(own) for own in stages}) > 1:
        raise PlanError(f"schedule {name!r} needs as many stages on each device, got {stages}")
    return stages


def wanted(stages: Sequence[tuple[int, ...]], places: Sequence[tuple[int, ...]], name: str) -> None:
    """Refuse a plan whose stages lie elsewhere than the schedule assumes.

    Raises:
        PlanError: naming the first device that differs.
    """
    for device, (own, place) in enumerate(zip(stages, places, strict=True)):
        if own != place:
            raise PlanError(f"schedule {name!r} runs stages {place} on device {device}, the plan has {own} there")


def closed(name: str, stages: Sequence[tuple[int, ...]], orders: Iterator[list[Instruction]]) -> Program:
    """A compute-only closed program."""
    devices = (
        DeviceProgram(device, own, tuple(order), ())
        for device, (own, order) in enumerate(zip(stages, orders, strict=True))
    )
    return Program(tuple(devices), (), name)
