"""Schedule: the order in which each device computes, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipecompile.errors import PlanError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedules.stream import stream

SCHEDULES: Mapping[str, Callable[[Plan], Program]] = {"stream": stream}


@dataclass(frozen=True)
class Schedule:
    """Apply the schedule ``name``, a key of :data:`SCHEDULES`."""

    name: str = "stream"

    def apply(self, plan: Plan) -> Program:
        """A compute-only program: no edges, no messages.

        Raises:
            PlanError: if there is no schedule of that name.
        """
        if self.name not in SCHEDULES:
            raise PlanError(f"there is no schedule {self.name!r}: choose one of {', '.join(sorted(SCHEDULES))}")
        return SCHEDULES[self.name](plan)


__all__ = ["SCHEDULES", "Schedule"]
