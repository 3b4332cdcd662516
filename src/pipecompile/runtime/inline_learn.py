"""Learns on streams in the caller's process, one thread, devices in turn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import PipelineClosed, PipelineError
from pipecompile.ir.learning import LearnPackage, Outcome
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import HOST
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.local import LocalEdge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.learn import Judge, LearnLink, LearnOptions, LearnUpdates
from pipecompile.runtime.learn_host import LearnHost
from pipecompile.runtime.module import execute
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.step import step_error
from pipecompile.runtime.update import DeviceUpdates


class InlineLearner:
    """Implements :class:`pipecompile.runtime.learn_host.Learner` in the caller's process."""

    def __init__(self, learn: LearnPackage, weights: Mapping[str, torch.Tensor], options: LearnOptions) -> None:
        package = learn.package
        self._closed, self._running = "", False
        room = bounds(package, None)
        local = {edge.name: LocalEdge(edge, room) for edge in package.program.edges}
        senders = {e.name: local[e.name].sender() for e in package.program.edges if e.source == HOST}
        (result,) = [e.name for e in package.program.edges if e.target == HOST]
        self._host = LearnHost(learn, senders, local[result].receiver())
        self.snapshots: list[dict[str, Any]] = []
        for name in package.imports:
            importlib.import_module(name)
        mutated = [entry.name for entry in package.state if entry.mutated]
        self._devices: list[_Device] = []
        for module in package.modules:
            ports: list[RingReceiver | RingSender] = [
                local[info.edge.name].receiver(i) if info.receives else local[info.edge.name].sender(i)
                for i, info in enumerate(ports_of(package.program.edges, module.stages))
            ]
            updates = LearnUpdates(learn.rule, learn.stages, module, learn.owned, weights, options)
            link = LearnLink(learn.rule, learn.stages, weights, ports, updates, options, self.snapshots.append, mutated)
            if learn.stages - 1 in module.stages:
                target = None if learn.target is None else learn.target.tree
                link.judge = Judge(options, package.out_tree, target)
            self._devices.append(_Device(module, link, updates))

    def begin(self, first: int) -> None:
        """See ``Learner``."""
        self._check()
        self._host.begin(first)
        self._running = True
        with self._failing(), stage_mode(1), torch.random.fork_rng(devices=[]):
            for device in self._devices:
                device.begin(self._host.submitted, first)

    def submit(self, leaves: Sequence[Any], target: Sequence[Any] | None, snapshot: bool) -> bool:
        """See ``Learner``."""
        self._check()
        return self._host.submit(leaves, target, snapshot)

    def end(self) -> bool:
        """See ``Learner``."""
        self._check()
        return self._host.end()

    def wait(self, *, room: bool, timeout: float | None = None) -> None:
        """See ``Learner``: computes until then, and so never waits."""
        self._check()
        host = self._host
        with self._failing(), stage_mode(1), torch.random.fork_rng(devices=[]):
            while not host.arrived() and not (room and host.room()) and self._running:
                moved = [device.advance() for device in self._devices]  # each gets one turn
                self._running = any(device.port is not None for device in self._devices)
                if self._running and not any(moved):
                    where = "; ".join(str(device) for device in self._devices)
                    raise PipelineError(f"deadlock, every device waits: {where}")

    def result(self) -> Outcome | None:
        """See ``Learner``."""
        self._check()
        return self._host.collect()

    @property
    def running(self) -> bool:
        """See ``Learner``."""
        return self._running

    def left_out(self) -> dict[int, int]:
        """See ``Learner``."""
        return {device.module.device: count for device in self._devices if (count := device.link.left_out())}

    def timeline(self) -> None:
        """See ``Learner``."""

    def states(self) -> list[dict[str, Any]]:
        """See ``Learner``."""
        return [
            {"state": d.updates.state(), "groups": d.updates.groups(), "version": d.link.version} for d in self._devices
        ]

    def load(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any], version: int | None) -> None:
        """See ``Learner``."""
        for device in self._devices:
            if state:
                device.updates.load(state)
            device.updates.set(settings)
            if version is not None:
                device.link.version = version

    def close(self) -> None:
        """See ``Learner``."""
        self._settle()
        self._closed = self._closed or "it was closed"

    def _check(self) -> None:
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}")

    def _failing(self) -> _Failing:
        return _Failing(self)

    def fail(self, error: BaseException) -> None:
        """Close because of an error."""
        self._closed = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self._settle()

    def _settle(self) -> None:
        for device in self._devices:
            device.link.settle()


class _Failing:
    """Closes a learner when its block raises."""

    def __init__(self, learner: InlineLearner) -> None:
        self._learner = learner

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._learner.fail(error)


class _Device:
    """One device: its module and, while a stream runs, its generator and the port that waits for."""

    def __init__(self, module: DeviceModule, link: LearnLink, updates: DeviceUpdates) -> None:
        self.module, self.link, self.updates = module, link, updates
        self.port: Any = None
        self._sample = -1
        self._run = execute(module.source, module.filename)["run"]
        self._steps: Any = None

    def begin(self, start: int, first: int) -> None:
        """Run up to the first wait."""
        self.link.offset = first - start
        self._steps = self._run(self.link, start)
        self._resume(None)

    def advance(self) -> bool:
        """Go on if the present wait is over; whether it was."""
        if self.port is None or not self.port.ready():
            return False
        self._sample = self.port.sample + self.link.offset
        try:
            value = self.port.take()
        except SampleFailed:
            value = None
        self._resume(value)
        return True

    def _resume(self, value: Any) -> None:
        try:
            self.port = self._steps.send(value)
        except StopIteration:
            self.port = None
        except Exception as error:
            where = f" at sample {self._sample}"
            module = self.module
            raise step_error(error, module.filename, module.device, module.stages, where) from error

    def __str__(self) -> str:
        waits = "has ended its stream" if self.port is None else f"waits on edge {self.port.edge}"
        return f"device {self.module.device} {waits}"


__all__ = ["InlineLearner"]
