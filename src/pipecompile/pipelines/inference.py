"""What users hold: a compiled model that is called, streamed through, saved and closed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile import artefact
from pipecompile._version import __version__
from pipecompile.errors import InputError, PipelineClosed
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import Package
from pipecompile.ir.sample import Counts
from pipecompile.ir.timeline import Timeline
from pipecompile.pipelines.facade import Pipeline
from pipecompile.runtime.surviving import Surviving
from pipecompile.simulate import simulate
from pipecompile.streams.call import call
from pipecompile.streams.engine import Engine, ExecutorName, OnFailure
from pipecompile.streams.entrance import OnError, Options, Overload
from pipecompile.streams.pulled import Stream
from pipecompile.streams.pushed import Pushed, Results
from pipecompile.streams.ticket import Ticket


class InferencePipeline(Pipeline):
    """A compiled model. ``pipe(x)`` equals ``model(x)``; ``pipe.stream(xs)`` keeps every device busy.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names, and
    share their storage with the workers: a parameter changed in place counts from the next sample
    on. Workers start at the first use and end with ``close()``, at the end of a ``with`` block, or
    when the pipeline is garbage collected.

    It is used by one at a time, from any thread: a call, a stream, or submitted samples. A forked
    child cannot use it.
    """

    def __init__(
        self,
        package: Package,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        *,
        executor: ExecutorName = "process",
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
        on_overload: Overload = "block",
        max_in_flight: int | None = None,
        deadline: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(model)
        self._package = package
        self._options = Options(on_overload, max_in_flight, deadline)
        self._engine = Engine(
            package,
            tensors,
            model,
            executor=executor,
            on_failure=on_failure,
            hang_seconds=hang_seconds,
            throttle=throttle,
        )
        self._pushed = Pushed(self._engine, self._options)
        self._initial = {e.name: tensors[e.name].detach().clone() for e in package.state if e.mutated}
        self.training = False

    @property
    def package(self) -> Package:
        """Everything that ``save()`` writes but the weights."""
        return self._package

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed, and cannot be used any more."""
        return self._engine.closed

    @property
    def counts(self) -> Counts:
        """Where all samples since the beginning are, calls included; of one moment, from any thread."""
        return self._engine.ledger.counts()

    @property
    def restarts(self) -> int:
        """How often the workers were replaced (``on_failure="restart"``) since they last were started at all."""
        session = self._engine.session
        return session.restarts if isinstance(session, Surviving) else 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One sample through the whole pipeline; the same result as the model's.

        Raises:
            InputError: if the call does not match what was compiled, or a stream is under way.
            StageError: if a stage raises; the pipeline goes on.
            WorkerDied, WorkerHung, PipelineError: if the pipeline is lost.
        """
        return call(self._engine, args, kwargs)

    def stream(
        self,
        source: Iterable[Any],
        *,
        on_overload: Overload | None = None,
        max_in_flight: int | None = None,
        deadline: float | None = None,
        records: bool = False,
        on_error: OnError = "raise",
    ) -> Stream:
        """Results for a source of samples, in order, while later samples are already under way.

        A sample is a tensor, a tuple of positional arguments (or a list, as data loaders give), a dict
        of keyword arguments, or a :class:`Sample` around one of these.
        A source whose attribute ``live`` is true is read by a thread at its own pace, and only the
        newest sample waits (``latest``); any other is asked for a sample when there is room (``block``).

        Args:
            source: an iterable of samples; read as far ahead as the rings or ``max_in_flight`` allow.
            on_overload: what happens to samples that come faster than they can enter, if not the
                above or what the pipeline was compiled with: ``"block"``, ``"drop_oldest"``,
                ``"drop_newest"``, ``"latest"`` or ``"error"``. See docs/streams.md.
            max_in_flight: how many samples may be inside the pipeline.
            deadline: seconds from being offered after which a sample that has not entered is dropped.
            records: yield :class:`Result` (value and :class:`Record`) instead of bare values.
            on_error: ``"raise"`` the error of a sample that failed (``next()`` on the same stream
                then gives the result after it), ``"skip"`` it, or ``"return"`` it in its place.

        Returns:
            An iterator. Ending the iteration early computes and drops what is inside.

        Raises:
            InputError: at once for an option that makes no sense; at the first sample if the
                pipeline is busy; and, naming the sample, for one that does not fit.
            StageError: from ``next()``, for a sample at which a stage raised.
            Exception: what the source raised, after the results of all it gave before.
            WorkerDied, WorkerHung, PipelineError: if the pipeline is lost.
        """
        if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise InputError(f"stream() takes an iterable of samples, got {type(source).__name__}")
        default = self._options
        policy = on_overload or default.on_overload
        if on_overload is None and default.on_overload == "block" and getattr(source, "live", False) is True:
            policy = "latest"
        options = Options(
            policy,
            default.max_in_flight if max_in_flight is None else max_in_flight,
            default.deadline if deadline is None else deadline,
            on_error,
            records,
        )
        return Stream(self._engine, source, options)

    def submit(
        self,
        sample: Any,
        pts: float | None = None,
        *,
        callback: Callable[[Ticket], Any] | None = None,
        timeout: float | None = None,
    ) -> Ticket:
        """Hand over one sample from any thread; its result comes through the ticket.

        The policy is the pipeline's own (``on_overload``, ``max_in_flight``, ``deadline`` of
        :func:`compile`). The sample is copied, so its memory may be used again at once.

        Args:
            sample: as for :meth:`stream`.
            pts: a time stamp that travels with it.
            callback: called with the ticket when it is over, in the order of the samples.
            timeout: seconds to wait for room under ``block``.

        Raises:
            InputError: if the sample does not fit, or a stream or call is under way. It is not counted.
            Overloaded: under ``error`` at a full entrance (counted as dropped); under ``block``
                after ``timeout`` seconds, or when this thread alone could make room (not counted).
            PipelineClosed: after the pipeline's end.
        """
        return self._pushed.submit(sample, pts, callback, timeout)

    def results(self, *, on_error: OnError = "raise", records: bool = False) -> Results:
        """An iterator over the results of samples submitted from now on, in order; see :class:`Results`.

        Raises:
            StageError: from ``next()``, for a sample that failed, as in :meth:`stream`.
        """
        return self._pushed.results(on_error, records)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until no submitted sample is in flight; whether that came within ``timeout`` seconds."""
        return self._pushed.flush(timeout)

    def simulate(self, samples: int = 64) -> Timeline:
        """What the plan predicts for a stream of that many samples."""
        link = self.plan.cluster.link
        return simulate(self.program, self.plan, link, samples, throttle=self._engine.throttle)

    def timeline(self) -> Timeline:
        """What was measured of the last samples.

        Raises:
            PipelineClosed: if nothing has run yet.
        """
        if self._engine.session is None:
            raise PipelineClosed("nothing has run yet: there is no timeline")
        return self._engine.session.timeline()

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a web page that shows the plan and, where something has run, predicted beside measured.

        The page needs nothing else: no network and no script.

        Raises:
            InputError: if the file cannot be written.
        """
        from pipecompile.report.html import html
        from pipecompile.report.page import write_page

        measured = None if self._engine.session is None else self.timeline()
        if measured is not None and not measured.finishes:
            measured = None
        return write_page(path, html(self._package, self.simulate(), measured))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the pipeline to a folder that :func:`pipecompile.load` reads without the model's source.

        Raises:
            ArtefactError: if the folder cannot be written or holds something else.
        """
        return artefact.save(self._package, self._engine.state.current(), path, __version__)

    def reset_state(self) -> None:
        """Put buffers that the model writes to back to what they were when it was compiled."""
        if self._engine.busy:
            raise InputError("samples are in flight: finish the stream before reset_state()")
        with torch.no_grad():
            current = self._engine.state.current()
            for name, value in self._initial.items():
                current[name].copy_(value)

    def close(self) -> None:
        """End the workers. Closing twice is fine; parameters and buffers stay usable."""
        self._engine.close()
        self._pushed.wake()
