"""What users hold to learn on a stream: a compiled model whose ``learn`` updates with every sample."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipecompileWarning, PipelineClosed, PipelineError, WorkerDied, WorkerHung
from pipecompile.ir.cluster import Link
from pipecompile.ir.learning import PREDICTED, SKIPPED, Learned, LearnPackage, Outcome
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost
from pipecompile.ir.tree import unflatten
from pipecompile.pipelines.learn_pairs import Pairs
from pipecompile.pipelines.learn_run import LearnRun
from pipecompile.pipelines.learn_source import Live, Pulled
from pipecompile.pipelines.learning_state import LearningState
from pipecompile.runtime.inline_learn import InlineLearner
from pipecompile.runtime.learn import LearnOptions
from pipecompile.runtime.learn_host import Learner
from pipecompile.runtime.process_learn import ProcessLearner
from pipecompile.simulate.learn import simulate_learn
from pipecompile.streams.engine import ExecutorName, OnFailure
from pipecompile.streams.entrance import Options, Overload


class LearningPipeline(LearningState):
    """A model compiled to learn on a stream: ``for result in pipe.learn(samples): ...``.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names. The
    optimizers live with the stages. Workers start with the first sample and end with ``close()``,
    at the end of a ``with`` block, or when the pipeline is garbage collected.
    """

    def __init__(
        self,
        learn: LearnPackage,
        retarget: Callable[[Any], LearnPackage],
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        options: LearnOptions,
        *,
        executor: ExecutorName = "process",
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
        on_failure: OnFailure = "raise",
        snapshot_every: int = 100,
        costs: tuple[StageCost, ...],
    ) -> None:
        super().__init__(learn, tensors, model, options, costs)
        self._retarget = retarget
        self._pairs = Pairs(learn)
        self._executor: ExecutorName = executor
        self._watching: dict[str, Any] = {"hang_seconds": hang_seconds, "throttle": throttle}
        self._every = snapshot_every if on_failure == "restart" else 0
        self._last: dict[str, Any] | None = None
        self._deaths, self._seen = 0, -1
        self.restarts = self.relearned = self.left_out = 0
        self._stale = False

    def simulate(self, samples: int = 64) -> Timeline:
        """What a stream of so many samples is predicted to look like, from the measured costs of the stages."""
        return simulate_learn(
            self.program, self.costs, samples, self.plan.cluster.link, cluster=self.plan.cluster,
            throttle=self._watching["throttle"],
        )  # fmt: skip

    def timeline(self) -> Timeline:
        """What the workers did with the latest samples; also while learning goes on, until the pipeline is closed.

        What a device does between its backward's result and its next message is called its update.

        Raises:
            PipelineClosed: if there are no workers (any more).
            InputError: with ``executor="inline"``, where devices take turns and nothing is measured.
        """
        with self._lock:
            if self._learner is None or self._closed:
                raise PipelineClosed("no workers are there: there is no timeline")
            measured = self._learner.timeline()
        if measured is None:
            raise InputError("executor='inline' measures nothing: devices take turns there")
        return measured

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a web page that shows the plan and, where something has been learned, predicted beside measured.

        The page needs nothing else: no network and no script.

        Raises:
            InputError: if the file cannot be written.
        """
        from pipecompile.report.html import html
        from pipecompile.report.page import write_page

        with self._lock:
            measured = None if self._learner is None or self._closed else self._learner.timeline()
        seen = measured if measured is not None and measured.finishes else None
        return write_page(path, html(self.package, self.simulate(), seen))

    def learn(
        self,
        samples: Iterable[Any],
        *,
        on_overload: Overload = "block",
        max_waiting: int | None = None,
        deadline: float | None = None,
    ) -> Generator[Learned]:
        """Results for a source of (input, target) pairs, in order, while later samples are under way.

        An input is a tensor, a tuple of positional arguments or a dict of keyword arguments, as in
        the examples. A target is a tensor or a nest of tensors, always of the same shapes, or None:
        predict, do not learn. A result comes when the loss of its sample is known; its own update
        may still be under way in earlier stages. When the iteration is over, all updates are made.
        Ended early, it computes and updates what is inside, and drops those results.

        Args:
            samples: the source; asked for a sample when there is room.
            on_overload: anything but ``"block"`` reads it in a thread at its own pace instead. A pair
                that finds the entrance full then goes, or makes another go, as in
                :meth:`pipecompile.InferencePipeline.stream`: ``"drop_oldest"``, ``"drop_newest"``,
                ``"latest"``, ``"error"``. Targets go with their inputs; ``result.seq`` counts dropped
                samples too. See :attr:`counts`.
            max_waiting: how many may wait at the entrance; 8, or 1 for ``"latest"``, if None. Not for
                ``"block"``, where none waits there.
            deadline: seconds after which a sample that still waits there is dropped; not for ``"block"``.

        Raises:
            InputError: from ``next()``, naming the sample, if one does not fit; at once if another
                stream is under way.
            StepError: if a stage or the loss raises, or a loss is not finite; the pipeline is closed then.
            WorkerDied, WorkerHung, PipelineError: if a device is lost; the pipeline is closed then.
            Exception: what the source raised, after the results of all it gave before.
        """
        self._idle()
        if max_waiting is not None and max_waiting < 1:
            raise InputError(f"max_waiting={max_waiting}: at least one sample must find room at the entrance")
        options = Options(on_overload, max_waiting, deadline)
        if on_overload == "block" and (max_waiting, deadline) != (None, None):
            raise InputError(
                "max_waiting= and deadline= are for samples that wait at the entrance; with on_overload='block' the "
                "source is asked for one when there is room: choose another policy"
            )
        return self._results(samples, options)

    def _begin(self, samples: Iterable[Any], options: Options) -> LearnRun:
        with self._lock:
            self._idle()
            if self._every:
                self._last = self._state.snapshot(self._learner, self._samples)
            live = options.on_overload != "block"
            source = Live(samples, options) if live else Pulled(samples)
            inside = len(self.plan.stages) if options.on_overload == "latest" else 1 << 60
            self._run = LearnRun(source, self._prepare, self, self._samples, self.rule.accumulate, inside, self._every)
            return self._run

    def _results(self, samples: Iterable[Any], options: Options) -> Generator[Learned]:
        run = self._begin(samples, options)
        try:
            more = True
            while more or run.results:
                with self._lock:
                    while more and not run.results:
                        more = self._turn(run)
                    result = self._learned(run) if run.results else None
                if result is not None:
                    yield result
            if run.error is not None:
                raise run.error
        finally:
            with self._lock:
                self._finish(run)

    def _finish(self, run: LearnRun) -> None:
        """Let what is in flight come out, and drop it."""
        run.stop()
        try:
            while not self._closed and self._turn(run):
                run.results.clear()
            if self._learner is not None:
                self._tell(self._learner.left_out())
        finally:
            if self._run is run:
                self._counted, self._samples, self._run = self.counts, run.submitted, None
                # What nobody took counts as dropped.
                lost = self._counted.in_flight
                self._counted = replace(self._counted, dropped=self._counted.dropped + lost, in_flight=0)

    def _tell(self, left_out: Mapping[int, int]) -> None:
        if not left_out:
            return
        self.left_out += sum(left_out.values())
        each = ", ".join(f"{count} on device {device}" for device, count in sorted(left_out.items()))
        warnings.warn(
            f"updates whose gradients were NaN or infinite, though the loss was not, were left out: {each}",
            PipecompileWarning,
            stacklevel=4,
        )

    def _turn(self, run: LearnRun) -> bool:
        try:
            more = run.turn()
        except Exception as error:
            if isinstance(error, (WorkerDied, WorkerHung)) and self._restart(run, error):
                return True
            self._fail(error)
            raise
        saved = run.saved(self._learn.stages) if self._every else None
        if saved is not None:
            self._last = self._state.assembled(saved[1], saved[0])
        return more

    def _restart(self, run: LearnRun, error: Exception) -> bool:
        """Go on from the last snapshot with new workers; False after three deaths in a row without a new result."""
        self._deaths = self._deaths + 1 if run.delivered + len(run.results) == self._seen else 1
        self._seen = run.delivered + len(run.results)
        if self._last is None or self._deaths > 3:
            return False
        assert self._learner is not None
        self._learner.close()
        self._learner = None
        self._state.put_back(self._last, None)
        again = run.restart(self._last["samples"])
        self.restarts, self.relearned = self.restarts + 1, self.relearned + again
        warnings.warn(
            f"{str(error).splitlines()[0]}. The workers are replaced; {again} samples are learned again, from the "
            f"snapshot after {self._last['samples']} samples on",
            PipecompileWarning,
            stacklevel=4,
        )
        return True

    def _learned(self, run: LearnRun) -> Learned:
        outcome: Outcome = run.results.popleft()
        seq, run.delivered = self._counted.submitted + run.sequence.popleft(), run.delivered + 1
        output = unflatten(self._learn.package.out_tree, list(outcome.outputs))
        loss = None if outcome.status == PREDICTED else outcome.loss
        return Learned(seq, output, loss, outcome.versions, outcome.times, outcome.status == SKIPPED)

    def _prepare(self, item: Any, sample: int) -> tuple[list[Any], list[Any] | None]:
        """See :data:`pipecompile.pipelines.learn_run.Prepare`."""
        leaves, target = self._pairs.flat(item, sample)
        if target is None:
            return leaves, None
        if self._learn.target is None:
            # The first target there is says what all are like; nothing has been learned until now.
            try:
                self._learn = self._retarget(target)
            except InputError as error:
                raise InputError(f"sample {sample}: {error}") from error
            self._stale = self._learner is not None
        assert self._learn.target is not None
        return leaves, self._pairs.flat_target(target, sample, self._learn.target)

    def close(self) -> None:
        """End. What is in flight is computed and updates made, its results dropped. Closing twice is fine.

        Parameters and buffers stay usable.
        """
        with self._lock:
            if self._run is not None and not self._closed:
                with contextlib.suppress(PipelineError):
                    self._finish(self._run)
            if self._learner is not None:
                self._learner.close()
            self._closed = self._closed or "it was closed"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, in this process, in the mode it is in: for evaluation between streams.

        Raises:
            InputError: while a stream is under way, whose newest weights are elsewhere.
        """
        if self._run is not None:
            raise InputError("a stream is under way: load snapshot()['model'] into a model of its own to evaluate it")
        return self._model(*args, **kwargs)

    def _fail(self, error: BaseException) -> None:
        self._closed = (
            self._closed or f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
        if self._learner is not None:
            self._learner.close()

    @property
    def stale(self) -> bool:
        """See :class:`pipecompile.pipelines.learn_run.Executors`."""
        return self._stale

    def ready(self) -> Learner:
        """See :class:`pipecompile.pipelines.learn_run.Executors`."""
        self._check()
        if self._stale and self._learner is not None:
            self._learner.close()  # it has seen no target yet: there is nothing to carry over but what was loaded
            self._learner, self._stale = None, False
        if self._learner is None:
            tensors = self._weights.current()
            if self._executor == "inline":
                self._learner = InlineLearner(self._learn, tensors, self._options)
            else:
                self._learner = ProcessLearner(self._learn, tensors, self._options, **self._watching)
            self._weights.remember()
            self._state.hand_over(self._learner)
        elif self._weights.moved():
            raise InputError(
                "the model's parameters were replaced (assign=True, .double(), .to()): compile again, or load values "
                "in place with load_state_dict"
            )
        return self._learner


__all__ = ["LearningPipeline"]
