"""The schedules of a training step, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedules.breadth_first import breadth_first
from pipecompile.schedules.gpipe import gpipe
from pipecompile.schedules.interleaved import interleaved
from pipecompile.schedules.one_f_one_b import one_f_one_b
from pipecompile.schedules.step import loop, vee
from pipecompile.schedules.zb_h1 import zb_h1
from pipecompile.schedules.zb_v import zb_v

ScheduleName = Literal["auto", "gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_v"]


@dataclass(frozen=True)
class StepSchedule:
    """A schedule, how many stages it puts on each device, and which (``loop`` or ``vee``)."""

    order: Callable[[Plan, int], Program]
    chunks: int = 1
    folded: bool = False
    splits: bool = False

    def place(self, devices: int) -> list[int]:
        """Device of each stage, for that many devices."""
        rows = [vee(d, devices) if self.folded else loop(d, devices, self.chunks) for d in range(devices)]
        device_of = {stage: device for device, own in enumerate(rows) for stage in own}
        return [device_of[stage] for stage in range(devices * self.chunks)]


STEP_SCHEDULES: Mapping[str, StepSchedule] = {
    "gpipe": StepSchedule(gpipe),
    "1f1b": StepSchedule(one_f_one_b),
    "interleaved": StepSchedule(interleaved, chunks=2),
    "breadth_first": StepSchedule(breadth_first, chunks=2),
    "zb_h1": StepSchedule(zb_h1, splits=True),
    "zb_v": StepSchedule(zb_v, chunks=2, folded=True, splits=True),
}

__all__ = ["STEP_SCHEDULES", "ScheduleName", "StepSchedule"]
