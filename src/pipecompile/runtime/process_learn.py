"""Learns on streams in worker processes, one a device, and watches over them."""

from __future__ import annotations

import math
import os
import select
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipecompile.errors import PipelineClosed, PipelineError, StepError
from pipecompile.ir.cluster import Link
from pipecompile.ir.learning import LearnPackage, Outcome
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import HOST
from pipecompile.ir.timeline import Event, Timeline
from pipecompile.runtime import numerics, pickled
from pipecompile.runtime.arena import adopt
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, clock
from pipecompile.runtime.channels.shared_memory import SharedEdge
from pipecompile.runtime.executor import bounds
from pipecompile.runtime.learn import LearnOptions
from pipecompile.runtime.learn_device import LearnBoot, unpacked_parts
from pipecompile.runtime.learn_host import LearnHost
from pipecompile.runtime.learn_sets import SharedSets, Tensors, fetch
from pipecompile.runtime.records import DeviceRecord, timeline
from pipecompile.runtime.second_look import SecondLook
from pipecompile.runtime.step_crew import Crew, Deadlock, Worker, standstill

_START_SECONDS = 60.0
_HANG_SECONDS, _HANG_FACTOR = 5.0, 10.0
#: How long devices may take to come to a wait before they are killed, so that no update is torn.
_GRACE_SECONDS = 5.0


class ProcessLearner:
    """Implements :class:`pipecompile.runtime.learn_host.Learner` with worker processes.

    Weights move into shared memory, optimizers live in the workers. A stream is one command to
    every worker and one answer of each, at its end; samples, gradients and results go through
    rings, and the caller is in between none of them. ``hang_seconds`` is how long a device may
    compute without reaching its next message; ``throttle`` slows edges down.
    """

    def __init__(
        self,
        learn: LearnPackage,
        weights: Mapping[str, torch.Tensor],
        options: LearnOptions,
        *,
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
    ) -> None:
        self._learn, self._closed = learn, "it never started"
        self._tensors = dict(weights)
        self._weights = adopt(self._tensors)
        self._crew = crew = Crew()
        self._finalizer = weakref.finalize(self, crew.stop)
        planned = max(stage.load for stage in learn.package.plan.stages)
        self._limit = max(_HANG_SECONDS, _HANG_FACTOR * planned) if hang_seconds is None else hang_seconds
        self.snapshots: list[dict[str, Any]] = []
        self._left_out: dict[int, int] = {}
        self._sets: list[tuple[Any, list[Tensors], Tensors]] = []
        self._alarm, self._busy = SecondLook(), set[int]()
        self._channels: dict[int, Worker] = {}
        try:
            self._open(options, dict(throttle or {}))
        except BaseException:
            crew.stop()
            raise
        self._closed = ""

    def _open(self, options: LearnOptions, throttle: dict[str, Link]) -> None:
        learn, package, crew = self._learn, self._learn.package, self._crew
        sizes = bounds(package, None)
        edges = {e.name: SharedEdge.create(e, sizes) for e in package.program.edges}
        arenas = tuple(arena.fd for arena in self._weights.arenas)
        mutated = tuple(entry.name for entry in package.state if entry.mutated)
        try:
            for module in package.modules:
                mine = tuple(e for e in package.program.edges if {e.source, e.target} & set(module.stages))
                worker = Worker(module, ports_of(mine, module.stages), "sample")
                crew.workers.append(worker)
                device = package.plan.cluster.devices[module.device]
                sets = self._further(module)
                worker.start(
                    [*arenas, sets.fd, *(fd for e in mine for fd in edges[e.name].fds)], device.core, device.threads
                )
                boot = LearnBoot(
                    module, learn.rule, learn.stages, mine, {e.name: edges[e.name].fds for e in mine}, sizes,
                    {name: link for name, link in throttle.items() if any(e.name == name for e in mine)},
                    worker.records_fd, arenas, self._weights.describe(module.state),
                    {s: learn.owned[s] for s in module.stages if s in learn.owned}, sets, mutated, options,
                    package.out_tree, None if learn.target is None else learn.target.tree,
                    device.threads, numerics.snapshot(), package.imports,
                )  # fmt: skip
                worker.say(boot, "loss_fn, the optimizer or a class in the model's result")
            ours = [e for e in package.program.edges if HOST in (e.source, e.target)]
            senders = {e.name: edges[e.name].sender() for e in ours if e.source == HOST}
            (result,) = [e for e in ours if e.target == HOST]
            receiver = edges[result.name].receiver(throttle=throttle.get(result.name))
            self._host = LearnHost(learn, senders, receiver)
            self._arrivals: dict[int, RingReceiver | RingSender] = {edges[result.name].arrivals: receiver}
            self._credits: dict[int, RingReceiver | RingSender] = {
                edges[name].credits: sender for name, sender in senders.items()
            }
            crew.fds += [fd for e in ours for fd in (edges[e.name].arrivals, edges[e.name].credits)]
        finally:
            kept = set(crew.fds)
            for edge in edges.values():
                for fd in edge.fds:
                    if fd not in kept:
                        os.close(fd)
        for worker in crew.workers:
            answer = worker.hear(_START_SECONDS)
            if answer[0] != "ready":
                raise PipelineError(f"{worker} could not start: {answer[1]}")
            os.close(worker.records_fd)
            worker.records_fd = -1
        self._channels = {worker.commands.fileno(): worker for worker in crew.workers}
        self._for_result = _poller([*self._channels, *self._arrivals])
        self._for_either = _poller([*self._channels, *self._arrivals, *self._credits])

    def _further(self, module: DeviceModule) -> SharedSets:
        """Memory for the versions of its weights that the one stage of a device keeps beside the newest."""
        learn, (stage,) = self._learn, module.stages
        names = learn.owned.get(stage, ())
        sets = SharedSets.create(self._weights.describe(names), learn.rule.sets(stage, learn.stages) - 1)
        self._crew.fds.append(sets.fd)
        self._sets.append((*sets.open(), tuple(self._tensors[name] for name in names)))
        return sets

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(worker.process.pid for worker in self._crew.workers if worker.process is not None)

    def begin(self, first: int) -> None:
        """See ``Learner``."""
        self._check()
        self._host.begin(first)
        self._busy = set(self._channels)
        self._guarded(lambda: [w.say(("learn", self._host.submitted, first)) for w in self._crew.workers])

    def submit(self, leaves: Sequence[Any], target: Sequence[Any] | None, snapshot: bool) -> bool:
        """See ``Learner``."""
        self._check()
        return self._host.submit(leaves, target, snapshot)

    def end(self) -> bool:
        """See ``Learner``."""
        self._check()
        return self._host.end()

    def wait(self, *, room: bool, timeout: float | None = None) -> None:
        """See ``Learner``."""
        self._check()
        self._guarded(lambda: self._wait(room, timeout))

    def _wait(self, room: bool, timeout: float | None) -> None:
        host, begun = self._host, clock()
        deadline = math.inf if timeout is None else begun + timeout
        poller = self._for_either if room else self._for_result
        ports = {**self._arrivals, **self._credits}
        while not host.arrived() and not (room and host.room()) and self._busy and clock() < deadline:
            seconds = min(self._limit / 4, 1.0, max(0.001, deadline - clock()))
            events = [fd for fd, _ in poller.poll(int(seconds * 1000))]
            for fd in events:
                if fd in ports:
                    ports[fd].refill()
            if host.arrived():
                return  # before a word of failure: what is there was learned from before it
            for fd in events:
                if fd in self._channels:
                    self._hear(fd)
            self._watch(begun)

    def _hear(self, fd: int) -> None:
        worker = self._channels[fd]
        kind, value = self._answer(worker)
        if kind == "snapshot":
            self.snapshots.append(unpacked_parts(value))
        else:
            self._busy.discard(fd)
            if value:
                self._left_out[worker.module.device] = value

    def _answer(self, worker: Worker) -> tuple[str, Any]:
        try:
            answer = worker.hear(_START_SECONDS)
        except EOFError:
            raise worker.death() from None
        if answer[0] == "error":
            raise StepError(answer[1])
        return answer[0], answer[1]

    def _watch(self, begun: float) -> None:
        workers = [self._channels[fd] for fd in self._busy]
        alarm = standstill(workers, begun, self._limit, lambda last: not last.end)
        if isinstance(alarm, Deadlock) and self._host.room():
            return  # they wait for samples
        if alarm is not None and self._alarm.confirms(worker.records for worker in workers):
            raise alarm

    def result(self) -> Outcome | None:
        """See ``Learner``."""
        self._check()
        return self._host.collect()

    @property
    def running(self) -> bool:
        """See ``Learner``."""
        return bool(self._busy)

    def left_out(self) -> dict[int, int]:
        """See ``Learner``."""
        found, self._left_out = self._left_out, {}
        return found

    def timeline(self) -> Timeline:
        """See ``Learner``. What a device does after it has sent its gradients is called its update."""
        records = [DeviceRecord(w.module.device, w.ports, w.records.all()) for w in self._crew.workers]
        measured = timeline(records, *self._host.times())
        edges = {edge.name: edge for edge in self._learn.package.program.edges}

        def named(event: Event) -> Event:
            if event.activity == "SEND" and edges[event.edge].backward:
                return replace(event, activity="STEP", edge="")
            if event.activity == "SEND" and edges[event.edge].kind == "result":
                # The last stage goes back as soon as its result is under way.
                return replace(event, activity="BW", edge="")
            return event

        return replace(measured, events=tuple(map(named, measured.events)))

    def states(self) -> list[dict[str, Any]]:
        """See ``Learner``."""
        return [unpacked_parts(part) for part in self._ask("state")]

    def load(self, state: Mapping[str, dict[str, Any]], settings: Mapping[str, Any], version: int | None) -> None:
        """See ``Learner``."""
        self._ask("load", pickled.packed(dict(state)), dict(settings), version)

    def _ask(self, *message: Any) -> list[Any]:
        """One command to all workers; their answers in the order of devices."""
        self._check()

        def ask() -> list[Any]:
            for worker in self._crew.workers:
                worker.say(message)
            return [self._answer(worker)[1] for worker in self._crew.workers]

        return self._guarded(ask)

    def close(self) -> None:
        """See ``Learner``. Devices that are computing come to their next wait first."""
        if self._closed != "it was closed" and self._crew.workers:
            self._settle()
        self._closed = self._closed or "it was closed"
        self._stop()

    def _stop(self) -> None:
        self._crew.stop()
        for each in self._sets:
            fetch(*each)
        self._sets = []
        if self._channels:
            self._host.forget()
            self._channels, self._arrivals, self._credits, self._busy = {}, {}, {}, set()

    def _settle(self) -> None:
        deadline, watched = clock() + min(_GRACE_SECONDS, self._limit), select.poll()
        while clock() < deadline:
            lasts = [(self._channels[fd], self._channels[fd].records.last()) for fd in self._busy]
            if not any(_alive(w) and last is not None and last.end > 0 for w, last in lasts):
                return
            watched.poll(2)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BaseException as error:
            self._closed = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            self._settle()
            self._stop()
            raise

    def _check(self) -> None:
        if self._closed or os.getpid() != self._crew.owner:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed or 'another process owns it'}")


def _alive(worker: Worker) -> bool:
    return worker.process is not None and worker.process.poll() is None


def _poller(fds: Sequence[int]) -> select.poll:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return poller


__all__ = ["ProcessLearner"]
