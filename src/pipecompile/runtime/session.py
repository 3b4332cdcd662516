"""Runs a Package in worker processes, one a device, and watches over them."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import PipecompileError, PipelineClosed, PipelineError, StageError
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import Package
from pipecompile.ir.program import HOST
from pipecompile.ir.timeline import Timeline
from pipecompile.runtime.arena import adopt
from pipecompile.runtime.channels.ring import RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, rouse
from pipecompile.runtime.crew import Crew
from pipecompile.runtime.executor import ResultTimeout, bounds, check_package, on_the_way
from pipecompile.runtime.host import Host
from pipecompile.runtime.news import News
from pipecompile.runtime.records import DeviceRecord, timeline
from pipecompile.runtime.second_look import SecondLook

#: How long ``close`` lets samples in flight be computed before it kills.
_GRACE_SECONDS = 5.0
#: How long devices stay awake after a call: another may follow at once.
_LINGER_SECONDS = 0.0003
#: How much longer than planned devices stay awake for a sample: the caller may be late with it.
_LATE_SECONDS = 0.001


class Session:
    """Implements :class:`~pipecompile.runtime.executor.Executor` with worker processes.

    Args:
        package: what to run.
        weights: tensors by ``StateSpec.name``; they move into shared memory (see ``arena.adopt``).
        sizes: the largest dynamic sizes to make room for; by default those of the example inputs.
        throttle: edges, by name, to slow down to a given link.
        hang_seconds: how long a device may compute one sample; default max(2, 10 x planned).
        threads: torch threads of each worker, instead of those in the plan.

    Raises:
        PipelineError: if a worker does not start.
        PipecompileError: if the weights cannot be shared.
    """

    def __init__(
        self,
        package: Package,
        weights: Mapping[str, torch.Tensor],
        *,
        sizes: Mapping[str, int] | None = None,
        throttle: Mapping[str, Link] | None = None,
        hang_seconds: float | None = None,
        threads: int | None = None,
    ) -> None:
        self._closed, self._failure, self._owner = True, None, os.getpid()
        check_package(package)
        missing = [spec.name for spec in package.state if spec.name not in weights]
        if missing:
            raise PipecompileError(f"the weights lack {missing}")
        self._tensors = {spec.name: weights[spec.name] for spec in package.state}
        self._weights = adopt(self._tensors)
        throttle = throttle or {}
        self._slack = sum(link.seconds(package.program.rings(name)[0].nbytes) for name, link in throttle.items())
        self._submitting, self._receiving = threading.RLock(), threading.RLock()
        self._crew = crew = Crew(package, hang_seconds, threads)
        # Works also when this object is dropped without close(), and at interpreter exit.
        self._finalizer = weakref.finalize(self, crew.stop)
        try:
            self._open(package, bounds(package, sizes), throttle)
        except BaseException:
            crew.stop()
            raise
        self._interval = min([worker.limit for worker in crew.workers], default=1.0) / 4
        self._checked, self._alarm = clock(), SecondLook()
        self._closed = False

    def _open(self, package: Package, sizes: Mapping[str, int], throttle: Mapping[str, Link]) -> None:
        edges: dict[str, SharedEdge] = {}
        kept: list[int] = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
        passed: list[int] = []
        try:
            for edge in package.program.edges:
                edges[edge.name] = shared = SharedEdge.create(edge, sizes)
                passed.append(shared.memory)
                kept.append(shared.arrivals)
                (kept if HOST in (edge.source, edge.target) else passed).append(shared.credits)
            senders = {e.name: edges[e.name].sender() for e in package.program.edges if e.source == HOST}
            receivers = {
                e.name: edges[e.name].receiver(throttle=throttle.get(e.between))
                for e in package.program.edges
                if e.target == HOST
            }
            self._host = Host(package, senders, receivers)
            self._host.open()
            self._crew.start(package, self._weights, edges, sizes, throttle)
        finally:
            self._crew.own(kept)
            for fd in passed:
                os.close(fd)
        self._wake, self._nudge = kept[:2]
        # Where devices share cores, one that does not sleep takes the time of another.
        cores = [worker.device.core for worker in self._crew.workers]
        apart = None not in cores and len(set(cores)) == len(cores)
        self._awake = [worker.records.awake for worker in self._crew.workers] if apart else []
        self._inner = [
            edges[edge.name].arrivals
            for edge in package.program.edges
            if apart and HOST not in (edge.source, edge.target)
        ]
        planned = [stage.seconds if stage.measured is None else stage.measured for stage in package.plan.stages]
        self._patience = 3 * sum(planned) + _LATE_SECONDS
        self._arrivals: dict[int, RingReceiver] = {edges[r.edge].arrivals: r for r in self._host.receivers}
        self._credits: dict[int, RingSender] = {edges[s.edge].credits: s for s in self._host.senders}
        self._news = News(self._crew)
        self._controls = frozenset(worker.control.fileno() for worker in self._crew.workers)
        # Only the side that takes results may empty their counters; the other side just looks.
        # It looks at the rings of the next result alone: others, of replicas, may be ahead.
        self._look: list[select.poll] = []
        for receivers in self._host.rounds:
            self._look.append(select.poll())
            for receiver in receivers:
                self._look[-1].register(edges[receiver.edge].arrivals, select.POLLIN)
        self._for_result = [self._poller(self._arrivals)]
        self._for_news = [self._poller([*self._arrivals, self._nudge])]
        self._for_room = [self._poller(self._credits)]
        self._for_either = [
            self._poller([*self._credits, *(edges[receiver.edge].arrivals for receiver in receivers)])
            for receivers in self._host.rounds
        ]
        self._rings: dict[int, RingReceiver | RingSender] = {**self._credits, **self._arrivals}
        self._for_turn = [self._poller([*self._rings, self._nudge])]

    def _poller(self, fds: Iterable[int]) -> select.poll:
        """One wait for data, death of a worker, and close() in another thread."""
        poller = select.poll()
        for fd in (*fds, self._wake, *self._controls):
            poller.register(fd, select.POLLIN)
        return poller

    def _next(self, each: Sequence[select.poll]) -> select.poll:
        """The one for the next result, of one for each round of replicas (or one for all)."""
        return each[self._host.delivered % len(each)]

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet delivered."""
        return self._host.submitted - self._host.delivered

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed."""
        # The interpreter's exit stops the crew first, and iterators that are still about close after it.
        return self._closed or self._crew.stopped

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(worker.process.pid for worker in self._crew.workers if worker.process is not None)

    def submit(self, leaves: Sequence[Any]) -> int | None:
        """Offer a sample; its number, or None while there is no room. See ``Executor.submit``."""
        with self._submitting:
            self._check()
            with _one_thread():
                return self._host.submit(leaves)

    def late(self, on: bool) -> None:
        """Have room only when the first stage waits. See ``Executor.late``."""
        self._host.late(on)

    def wait(self, timeout: float | None = None, *, or_result: bool = True) -> bool:
        """Block until there is room for a sample or a result to take. See ``Executor.wait``."""
        with self._submitting:
            self._check()
            host, room = self._host, self._host.room
            pollers = self._for_either if or_result else self._for_room

            def done() -> bool:
                return room() or (or_result and (host.something() or bool(self._next(self._look).poll(0))))

            self._await(pollers, done, timeout, self._credits, full=or_result)
            return room()

    def turn(self, timeout: float | None = None, *, room: bool = True) -> None:
        """Block until the next result is complete, there is room, or a nudge. See ``Executor.turn``."""
        with self._submitting, self._receiving:
            self._check()
            host = self._host

            def done() -> bool:
                return host.arrived() or (room and host.room())

            pollers, refills = (self._for_turn, self._rings) if room else (self._for_news, self._arrivals)
            self._await(pollers, done, timeout, refills)

    def nudge(self) -> None:
        """Make a ``turn`` in another thread come back early, or else the next one."""
        with self._news.lock:
            # Never after _release: the number of a closed descriptor may be another file's by then.
            if not self.closed:
                os.eventfd_write(self._nudge, 1)

    @contextlib.contextmanager
    def awake(self) -> Generator[None]:
        """Keep devices from sleeping; see ``Executor.awake``. Only where each has a core of its own."""
        until = clock() + self._patience
        for word in self._awake:
            word[0] = until
        with self._news.lock:
            if not self.closed:
                for fd in self._inner:
                    rouse(fd)
        try:
            yield
        finally:
            until = clock() + _LINGER_SECONDS
            for word in self._awake:
                word[0] = until

    def seconds(self, sample: int) -> tuple[float, ...]:
        """What each stage spent on a sample. See ``Executor.seconds``."""
        workers = on_the_way(self._crew.workers, sample)
        return tuple(worker.records.seconds(worker.ports, sample) for worker in workers)

    def poll(self) -> tuple[int, list[Any]] | None:
        """The next result if it is there, else None."""
        with self._receiving:
            self._check()
            return self._take(0.0) if self.in_flight else None

    def result(self, timeout: float | None = None) -> tuple[int, list[Any]]:
        """The next result, in order. See ``Executor.result``."""
        with self._receiving:
            self._check()
            if timeout is None and not self.in_flight:
                raise PipelineError("a result was awaited, but no sample is in flight; submit one first")
            taken = self._take(timeout)
            if taken is None:
                raise ResultTimeout(f"no result of sample {self._host.delivered} within {timeout} s")
            return taken

    def _take(self, timeout: float | None) -> tuple[int, list[Any]] | None:
        host = self._host
        if host.arrived() or self._await(self._for_result, host.arrived, timeout, self._arrivals):
            try:
                with _one_thread():
                    return host.collect(self._tensors)
            except SampleFailed as failed:
                reason = self._news.reason(failed.sample)
                raise (reason if isinstance(reason, StageError) else self._fail(reason)) from None
        return None

    def detached(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of weights that are no longer in the memory the workers use."""
        return self._weights.detached(weights)

    def timeline(self) -> Timeline:
        """What the devices did with the latest samples; also after ``close``."""
        records = [DeviceRecord(w.module.device, w.ports, w.records.all()) for w in self._crew.workers]
        return timeline(records, *self._host.times())

    def close(self) -> None:
        """End the stream, wait up to 5 s for samples in flight, stop the workers. May be repeated."""
        if os.getpid() != self._owner:
            return
        if not self.closed:
            self._closed = True
            os.eventfd_write(self._wake, 1)
            with self._submitting, self._receiving, contextlib.suppress(PipecompileError):
                self._drain(clock() + _GRACE_SECONDS)
        self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self.closed or os.getpid() != self._owner:
            if self._failure is not None:
                raise PipelineClosed(f"the pipeline has failed: {self._failure}") from self._failure
            if self.closed:
                raise PipelineClosed("the pipeline is closed")
            raise PipelineClosed(
                f"the pipeline belongs to process {self._owner}, and this is a fork of it: "
                "compile or load one in this process"
            )

    def _await(
        self,
        pollers: Sequence[select.poll],
        done: Callable[[], bool],
        timeout: float | None,
        refills: Mapping[int, RingReceiver | RingSender],
        *,
        full: bool = False,
    ) -> bool:
        """Wait until ``done``; False if that takes longer than ``timeout``. Fails when a device does.

        ``full``: the caller waits for room and for results alike, so it need not be woken for each.
        """
        deadline = math.inf if timeout is None else clock() + timeout
        while not done():
            watching = self.in_flight > 0
            if watching:
                self._watch()
            seconds = min(deadline - clock(), self._interval if watching else math.inf)
            delay = self._host.delay()
            if delay > 0.0:
                seconds = min(seconds, delay)
            elif full and not self._slack and (nap := self._host.nap()):
                time.sleep(nap)
                seconds = 0.0
            if 0.0 < seconds < 0.002:
                # poll counts in whole milliseconds.
                time.sleep(seconds)
                seconds = 0.0
            events = self._next(pollers).poll(None if seconds == math.inf else max(0, int(seconds * 1000)))
            self._check()
            for fd, _ in events:
                if fd in refills:
                    refills[fd].refill()
                elif fd == self._nudge:
                    os.eventfd_read(fd)
                    return done()
            said = [fd for fd, _ in events if fd in self._controls]
            if said:
                self._news.listen(said, self._host.delivered)
            if self._news.end is not None and not done():
                raise self._fail(self._news.end)
            if clock() >= deadline:
                return done()
        return True

    def _watch(self) -> None:
        now = clock()
        if now - self._checked > self._interval:
            self._checked = now
            stuck = self._crew.stuck(self._host.started[-1], self._slack)
            if stuck is not None and self._alarm.confirms(worker.records for worker in self._crew.workers):
                raise self._fail(stuck)

    def _fail(self, error: PipelineError) -> PipelineError:
        self._failure, self._closed = error, True
        os.eventfd_write(self._wake, 1)
        self._release()
        return error

    def _drain(self, deadline: float) -> None:
        """Send the end after the last sample and wait until it has gone through every device."""
        alive = set(self._controls)
        poller = select.poll()
        for fd in (*self._arrivals, *alive):
            poller.register(fd, select.POLLIN)
        self._host.end()
        while alive and clock() < deadline:
            self._host.drop()
            seconds = min(deadline - clock(), self._host.delay() or math.inf)
            for fd, _ in poller.poll(max(1, int(seconds * 1000))):
                if fd in alive:
                    alive.remove(fd)
                    poller.unregister(fd)

    def _release(self) -> None:
        self._crew.kill()
        # Another thread may still be polling; it was woken above and leaves soon.
        held = [lock for lock in (self._submitting, self._receiving) if lock.acquire(timeout=1.0)]
        try:
            if len(held) == 2:
                self._host.forget()
                self._arrivals, self._credits, self._rings = {}, {}, {}
                with self._news.lock:
                    self._crew.stop()
        finally:
            for lock in held:
                lock.release()


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """Copy on this thread alone: torch's other ones would go on spinning for a while, on the cores of the devices."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
