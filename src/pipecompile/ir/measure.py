"""How a pass asks for a measurement. The runtime implements it, the driver injects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipecompile.ir.cluster import Link
from pipecompile.ir.package import Package


@dataclass(frozen=True)
class Job:
    """A function of a generated module, by name, and what to call it with."""

    source: str
    function: str
    arguments: Sequence[Any]


class Measure(Protocol):
    """Timings on the device a plan is made for. All results are seconds."""

    def layers(
        self, source: str, arguments: Sequence[Any], marks: int, budget: float
    ) -> tuple[list[float], float, int]:
        """Run a generated module's ``model(clock, *arguments)`` repeatedly for about ``budget`` seconds.

        ``clock(i)`` is called after layer ``i`` of ``marks``. Returns the median of each layer's
        time in its place, the median of the whole, and the number of repeats.
        """
        ...

    def functions(self, jobs: Sequence[Job], budget: float) -> list[float]:
        """Time of each job where little else disturbs it (the lower quartile), for about ``budget`` seconds each.

        The jobs take turns of many runs: while a turn lasts a job has the caches to itself, as a
        stage on its own device has; a change of the machine's speed meets all of them alike.
        """
        ...

    def streams(
        self, packages: Sequence[Package], tensors: Mapping[str, torch.Tensor], leaves: Sequence[Any]
    ) -> list[float]:
        """Samples a second of each package, streaming the example ``leaves`` in real workers, in turns.

        Raises:
            PipecompileError: if workers cannot be had.
        """
        ...

    def slowdowns(self, jobs: Sequence[Job], cores: Sequence[int | None], budget: float) -> list[float]:
        """By what factor each job takes longer while all of them run at once, each on its core (None: on any).

        Each loops in a process of its own for about ``budget`` seconds alone and as long beside the
        others. Jobs that share a core are compared by their time on the processor.

        Raises:
            PipecompileError: if workers cannot be had.
        """
        ...

    def link(self) -> Link:
        """Latency and bandwidth of the channel between two devices, as busy time of one end."""
        ...
