"""What runs a Package, seen from the caller: worker processes or the caller's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from pipecompile.errors import PipecompileError
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.timeline import Timeline


class ResultTimeout(PipecompileError, TimeoutError):
    """No result within the time given; the pipeline goes on."""


class Executor(Protocol):
    """A running pipeline. One thread may submit while another takes results."""

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet delivered."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed."""
        ...

    def submit(self, leaves: Sequence[Any]) -> int | None:
        """Offer a sample (tensors and numbers in the order of ``Package.inputs``).

        Never waits: returns the sample's number, or None while the pipeline has no room for it.

        Raises:
            InputError: if a leaf does not fit; the pipeline goes on.
        """
        ...

    def late(self, on: bool) -> None:
        """Have room for a sample only when the first stage waits for one, rather than let it wait inside."""
        ...

    def wait(self, timeout: float | None = None, *, or_result: bool = True) -> bool:
        """Block until there is room for a sample; whether there is.

        Comes back without room when a result has arrived (it may have to be taken before there
        is room; ``or_result=False`` is for callers that take results in another thread), or after
        ``timeout`` seconds. Raises as :meth:`result` does when the pipeline fails.
        """
        ...

    def turn(self, timeout: float | None = None, *, room: bool = True) -> None:
        """Block until the next result is complete, or there is room (where asked), or nudged.

        For callers that submit and take results in one thread. Raises as :meth:`wait` does.
        """
        ...

    def nudge(self) -> None:
        """Make a :meth:`turn` in another thread come back early, or else the next one."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Held while somebody waits for a single sample: devices then do not sleep until it reaches them."""
        ...

    def seconds(self, sample: int) -> tuple[float, ...]:
        """Seconds each stage computed on a sample just delivered, in order; nan where not on record any more."""
        ...

    def poll(self) -> tuple[int, list[Any]] | None:
        """The next result if it is there, as :meth:`result`; else None."""
        ...

    def result(self, timeout: float | None = None) -> tuple[int, list[Any]]:
        """Number and leaves (in the order of ``Package.outputs``) of the next sample, in order.

        Output tensors own their memory.

        Raises:
            ResultTimeout: if there is none within ``timeout`` seconds.
            StageError: if a stage raised at this very sample. It is over then, the next ones go on.
            WorkerDied, WorkerHung, PipelineError: if the pipeline failed; it is closed then.
            PipelineClosed: if it was closed before.
        """
        ...

    def detached(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of weights that are no longer those the pipeline computes with."""
        ...

    def timeline(self) -> Timeline:
        """What was measured of the latest samples."""
        ...

    def close(self) -> None:
        """End the stream: samples in flight are computed, their results dropped. May be repeated."""
        ...


def check_package(package: Package) -> None:
    """Refuse what no executor can run.

    Raises:
        PipecompileError: if stages and modules, or inputs, outputs and edges, do not belong together.
    """
    placed = [(stage, module.replica) for module in package.modules for stage in module.stages]
    for edge in package.program.edges:
        for stage, replica in ((edge.source, edge.source_replica), (edge.target, edge.target_replica)):
            if stage >= 0 and placed.count((stage, replica)) != 1:
                raise PipecompileError(
                    f"stage {stage} of edge {edge.name} is run by {placed.count((stage, replica))} device modules"
                )


class Placed(Protocol):
    """Something that runs a device module."""

    @property
    def module(self) -> DeviceModule:
        """What it runs."""
        ...


_Device = TypeVar("_Device", bound=Placed)


def on_the_way(devices: Iterable[_Device], sample: int) -> list[_Device]:
    """The devices that compute a sample, in pipeline order: of several replicas one."""
    found = [device for device in devices if sample % device.module.replicas == device.module.replica]
    return sorted(found, key=lambda device: device.module.stages)


def bounds(package: Package, sizes: Mapping[str, int] | None) -> dict[str, int]:
    """The largest values of the dynamic sizes: those given, else those of the example inputs."""
    example = {name: package.inputs[symbol.input].shape[symbol.dim] for name, symbol in package.symbols.items()}
    return {**example, **(sizes or {})}
