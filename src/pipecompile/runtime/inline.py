"""Runs the same device modules in the caller's process, one thread, in a fixed order.

For tests, for breakpoints in stages, and for platforms without memfd.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pipecompile.errors import InputError, PipecompileError, PipelineClosed, PipelineError, StageError
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.program import HOST
from pipecompile.ir.timeline import Timeline
from pipecompile.runtime.channels.link import DeviceLink, PortInfo, ports_of
from pipecompile.runtime.channels.local import LocalEdge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.executor import ResultTimeout, bounds, check_package, on_the_way
from pipecompile.runtime.host import Host
from pipecompile.runtime.module import describe, execute, resume
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.records import SAMPLES, DeviceRecord, Wait, computed, timeline


class _Device:
    """The generator of one device and the port it waits for (None once its stream has ended)."""

    def __init__(
        self,
        module: DeviceModule,
        ports: Sequence[PortInfo],
        link: DeviceLink,
        peers: Sequence[RingReceiver | RingSender],
        errors: dict[int, StageError],
    ) -> None:
        self.module, self.ports = module, ports
        self.waits: list[Wait] = []
        self._failed_at = self._steps_done = 0
        self._began = clock()
        self._run: Any = execute(module.source, module.filename)["run"]
        self._link, self._peers, self._errors = link, peers, errors
        self._steps: Any = self._run(link, module.replica)
        self.port: RingReceiver | RingSender | None = None
        self._advance(None)

    def step(self) -> bool:
        """Go on to the next wait if the present one is over; whether it did."""
        port = self.port
        if port is None or not port.ready():
            return False
        index, sample, began = port.index, port.sample, self._began
        try:
            value = port.take()
        except SampleFailed:
            value = port
        self._steps_done += 1
        self.waits.append(Wait(index, sample, began, clock()))
        if len(self.waits) > 2 * SAMPLES * len(self.ports):
            del self.waits[: SAMPLES * len(self.ports)]
        if value is port:
            self._pass_over(sample)
        else:
            self._advance(value)
        return True

    def _pass_over(self, sample: int) -> None:
        """Go on with the sample after one that failed here or before."""
        self._steps = resume(self._run, self._link, self._peers, sample, self.module.replicas)
        self._advance(None)

    def _advance(self, value: Any) -> None:
        try:
            self.port = self._steps.send(value)
        except StopIteration:
            self.port = None
        except Exception as error:
            sample = self.waits[-1].sample if self.waits else -1
            found = describe(error, self.module.filename, self.module.device, self.module.stages, sample)
            failure = StageError(**found)
            if self._failed_at == self._steps_done or isinstance(error, PipelineError):
                raise failure from error  # it cannot begin at all, or not begin again, or its rings are broken
            self._failed_at = self._steps_done
            failure.__cause__ = error
            self._errors.setdefault(sample, failure)
            self._pass_over(sample)
        self._began = clock()

    def __str__(self) -> str:
        where = "has ended" if self.port is None else f"waits for {self.ports[self.port.index]}"
        sample = "" if self.port is None else f" (sample {self.port.sample})"
        return f"device {self.module.device} {where}{sample}"


class InlineSession:
    """Implements :class:`~pipecompile.runtime.executor.Executor` in the caller's process.

    Work is done inside ``wait``, ``poll`` and ``result``. Takes the arguments of
    :class:`~pipecompile.runtime.session.Session`; ``hang_seconds`` means nothing here, since
    nobody watches the one process there is.

    Raises:
        StageError: if a module fails before its first message.
    """

    def __init__(
        self,
        package: Package,
        weights: Mapping[str, torch.Tensor],
        *,
        sizes: Mapping[str, int] | None = None,
        throttle: Mapping[str, Link] | None = None,
        hang_seconds: float | None = None,
        threads: int = 1,
    ) -> None:
        check_package(package)
        missing = [spec.name for spec in package.state if spec.name not in weights]
        if missing:
            raise PipecompileError(f"the weights lack {missing}")
        self._threads, self._closed, self._failure = threads, False, None
        self._tensors = {spec.name: weights[spec.name] for spec in package.state}
        self._homes = {name: _home(tensor) for name, tensor in self._tensors.items()}
        room = bounds(package, sizes)
        throttle = throttle or {}
        edges = {edge.name: LocalEdge(edge, room) for edge in package.program.edges}
        self._host = Host(
            package,
            {e.name: edges[e.name].sender() for e in package.program.edges if e.source == HOST},
            {
                e.name: edges[e.name].receiver(0, throttle.get(e.between))
                for e in package.program.edges
                if e.target == HOST
            },
        )
        self._host.open()
        self._throttled: list[RingReceiver] = []
        self._errors: dict[int, StageError] = {}
        for name in package.imports:
            importlib.import_module(name)
        self._devices: list[_Device] = []
        with stage_mode(threads):
            for module in package.modules:
                infos = ports_of(package.program.edges, module.stages, module.replica)
                ports: list[RingReceiver | RingSender] = []
                for index, info in enumerate(infos):
                    edge = edges[info.edge.name]
                    link = throttle.get(info.edge.between)
                    ports.append(edge.receiver(index, link) if info.receives else edge.sender(index))
                self._throttled += [port for port in ports if isinstance(port, RingReceiver)]
                state = tuple(self._tensors[name] for name in module.state)
                self._devices.append(_Device(module, infos, DeviceLink(state, ports), ports, self._errors))

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet delivered."""
        return self._host.submitted - self._host.delivered

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed."""
        return self._closed

    def submit(self, leaves: Sequence[Any]) -> int | None:
        """Offer a sample; its number, or None while there is no room. See ``Executor.submit``."""
        self._check()
        return self._host.submit(leaves)

    def late(self, on: bool) -> None:
        """Have room only when the first stage waits. See ``Executor.late``."""
        self._host.late(on)

    def wait(self, timeout: float | None = None, *, or_result: bool = True) -> bool:
        """Run until there is room for a sample or a result to take. See ``Executor.wait``."""
        self._check()
        self._run(timeout, or_result, True)
        return self._host.room()

    def turn(self, timeout: float | None = None, *, room: bool = True) -> None:
        """Run until the next result is complete or there is room. See ``Executor.turn``."""
        self._check()
        if self.in_flight or room:
            self._run(timeout, True, room)

    def nudge(self) -> None:
        """Nothing to do: a turn here computes, and comes back as soon as that is done."""

    def awake(self) -> AbstractContextManager[None]:
        """Nobody sleeps here."""
        return nullcontext()

    def seconds(self, sample: int) -> tuple[float, ...]:
        """What each stage spent on a sample. See ``Executor.seconds``."""
        devices = on_the_way(self._devices, sample)
        return tuple(computed(d.ports, lambda k, w=d.waits: w[k], 0, len(d.waits), sample) for d in devices)

    def poll(self) -> tuple[int, list[Any]] | None:
        """The next result if the devices can make it now, else None."""
        self._check()
        return self._take(0.0) if self.in_flight else None

    def result(self, timeout: float | None = None) -> tuple[int, list[Any]]:
        """The next result, in order. See ``Executor.result``."""
        self._check()
        if timeout is None and not self.in_flight:
            raise PipelineError("a result was awaited, but no sample is in flight; submit one first")
        taken = self._take(timeout)
        if taken is None:
            raise ResultTimeout(f"no result of sample {self._host.delivered} within {timeout} s")
        return taken

    def detached(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of weights that are no longer those the stages compute with."""
        return [name for name, tensor in weights.items() if self._homes.get(name) != _home(tensor)]

    def timeline(self) -> Timeline:
        """What the devices did with the latest samples; also after ``close``."""
        records = [DeviceRecord(d.module.device, d.ports, d.waits) for d in self._devices]
        return timeline(records, *self._host.times())

    def close(self) -> None:
        """Compute the samples in flight, drop their results, end. May be repeated."""
        if self._closed:
            return
        self._closed = True
        try:
            with stage_mode(self._threads):
                self._host.end()
                moved = True
                while moved or self._delay() > 0.0:
                    self._host.drop()
                    moved = self._step()
                    if not moved:
                        time.sleep(self._delay())
        except StageError:
            # Nobody waits for these results; the samples delivered before were right.
            pass
        self._host.forget()

    def __enter__(self) -> InlineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            if self._failure is not None:
                raise PipelineClosed(f"the pipeline has failed: {self._failure}") from self._failure
            raise PipelineClosed("the pipeline is closed")

    def _take(self, timeout: float | None) -> tuple[int, list[Any]] | None:
        if not self._run(timeout, True, False):
            return None
        try:
            return self._host.collect(self._tensors)
        except SampleFailed as failed:
            raise self._errors.pop(failed.sample) from None

    def _run(self, timeout: float | None, result: bool, room: bool) -> bool:
        """Round robin until a result has arrived or there is room (whichever is asked for)."""
        host, deadline = self._host, None if timeout is None else clock() + timeout
        try:
            with stage_mode(self._threads):
                while True:
                    for receiver in host.receivers:
                        receiver.refill()
                    if (result and host.arrived()) or (room and host.room()):
                        return True
                    if self._step():
                        # With no time to wait, what can be done at once is still done.
                        if timeout and deadline is not None and clock() >= deadline:
                            return False
                        continue
                    delay = self._delay()
                    if deadline is not None and (delay <= 0.0 or clock() + delay > deadline):
                        return False
                    if delay <= 0.0:
                        where = "; ".join(str(device) for device in self._devices)
                        raise PipelineError(f"deadlock, every device waits: {where}")
                    time.sleep(delay)
        except (PipelineError, InputError) as error:
            self._failure, self._closed = error, True
            raise

    def _step(self) -> bool:
        """Give every device one turn; whether any could use it."""
        moved = [device.step() for device in self._devices]
        return any(moved)

    def _delay(self) -> float:
        """Seconds until the first throttled message arrives, 0 if there is none under way."""
        receivers = [*self._host.receivers, *self._throttled]
        return min([delay for receiver in receivers if (delay := receiver.delay()) > 0.0], default=0.0)


def _home(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
