"""One device's part in a training step: the generated code, and what follows when something raises.

A device that cannot go on still serves every port of the step: it takes what arrives and sends
messages that say they hold nothing. Whoever needs one of them stops computing likewise. So a
failure reaches exactly the devices that depend on it, nobody waits for ever, and all rings
end where the next step begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipecompile.errors import NonFiniteError, StepError
from pipecompile.ir.deal import Deal
from pipecompile.ir.link import Port
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed
from pipecompile.runtime.module import execute
from pipecompile.runtime.step import NotFinite, StepLink, step_error

_PAUSE = 2e-4
_TIED = ":tied"


@dataclass(frozen=True)
class Outcome:
    """How a step went on one device.

    ``error`` is what it raised; a device that only stopped because another did is ``abandoned``.
    ``updated`` says that weights may have been changed. ``not_finite`` is the micro-batch whose
    loss is NaN or infinite, or -1 where ``weights`` have such gradients; None otherwise. ``given``
    names the weights whose gradients were handed over to the caller.
    """

    losses: list[Any] = field(default_factory=list[Any])
    error: str = ""
    abandoned: bool = False
    updated: bool = False
    not_finite: int | None = None
    given: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the device did all of its part."""
        return not self.error and not self.abandoned


class StepRun:
    """Runs the steps of one device module over its link.

    ``micro_batches`` are those of a whole step that its pipeline is dealt, by ``deal``.
    """

    def __init__(
        self,
        module: DeviceModule,
        link: StepLink,
        ports: Sequence[RingReceiver | RingSender],
        micro_batches: int,
        deal: Deal,
    ) -> None:
        self._module, self._link, self._ports, self._count, self._deal = module, link, ports, micro_batches, deal
        namespace = execute(module.source, module.filename)
        link.spans.watch(namespace)
        self._step = namespace["step"]
        self.failed = False

    def run(self, done: int) -> Generator[Port, Any, Outcome]:
        """One step, after ``done`` others through the same rings. Yields the ports it waits for.

        What a port raises instead of giving a value is to be thrown in.
        """
        link, base = self._link, done * self._count
        link.begin()
        for port in self._ports:
            port.go_on(done if port.edge.endswith(_TIED) else base)
        self.failed = False
        try:
            yield from self._step(link, done)
        except SampleFailed:
            outcome = Outcome(abandoned=True, updated=link.updated)
        except NotFinite as error:
            outcome = Outcome(
                error=str(error), updated=link.updated, not_finite=error.micro_batch, weights=error.weights
            )
        except Exception as error:
            text = step_error(
                error, self._module.filename, self._module.device, self._module.stages, f" in step {link.number}"
            )
            if isinstance(error, torch.AcceleratorError):
                raise text from error  # nothing more can be done on that card, by any device
            outcome = Outcome(error=str(text), updated=link.updated)
        else:
            return Outcome(list(link.losses), updated=link.updated)
        self.failed = True
        messages = base + self._deal.count(link.parts)
        yield from drain(self._ports, lambda port: done + 1 if port.edge.endswith(_TIED) else messages)
        return outcome


def drain(
    ports: Sequence[RingReceiver | RingSender], end: Callable[[RingReceiver | RingSender], int]
) -> Generator[Port, Any, None]:
    """Carry all messages of the step under way, without looking at them or putting anything in.

    ``end`` says before which message of a port it ends; edges of tied weights have one a step.
    """
    pending = [port for port in ports if port.sample < end(port)]
    while pending:
        moved = False
        for port in pending:
            if isinstance(port, RingSender):
                while port.sample < end(port) and port.ready():
                    port.fail(port.sample)
                    moved = True
                continue
            port.post_until(end(port))
            while port.sample < end(port) and port.ready():
                port.skip()
                port.post_until(end(port))
                moved = True
        pending = [port for port in pending if port.sample < end(port)]
        if pending and not moved:
            yield _Pause()


def failure(outcomes: Sequence[Outcome]) -> StepError | None:
    """The exception of a step, if a device failed in it: that of the first that did not just follow another."""
    if all(outcome.whole for outcome in outcomes):
        return None
    found = next((outcome for outcome in outcomes if outcome.error), None)
    if found is None:  # the norm overflowed, though every gradient is finite
        return NonFiniteError("the norm of all gradients together is not finite")
    if found.not_finite is not None:
        return NonFiniteError(found.error, micro_batch=found.not_finite, weights=found.weights)
    return StepError(found.error)


def written_by(package: Package, module: DeviceModule) -> list[str]:
    """Placeholder names of the buffers a device writes to in a step."""
    written = {entry.name for entry in package.state if entry.mutated}
    return [name for name in module.state if name in written]


class _Pause:
    """A port that is ready in a moment. ``index`` and ``sample`` are for the records of a worker."""

    index, sample = -1, -1

    def ready(self) -> bool:
        """Always: whoever has others to run need not sleep."""
        return True

    def take(self) -> None:
        """Sleep a little."""
        time.sleep(_PAUSE)


__all__ = ["Outcome", "StepRun", "drain", "failure", "written_by"]
