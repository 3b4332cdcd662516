"""What users hold to learn on a stream: a compiled model whose ``learn`` updates with every sample."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, PipelineClosed, PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.learning import PREDICTED, SKIPPED, Learned, LearnPackage, Outcome, Rule
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.training import StageCost
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.learn_run import LearnRun
from pipecompile.model_weights import ModelWeights
from pipecompile.runtime.inline_learn import InlineLearner
from pipecompile.runtime.learn import LearnOptions
from pipecompile.runtime.learn_host import Learner
from pipecompile.runtime.process_learn import ProcessLearner
from pipecompile.training import ExecutorName


class LearningPipeline(nn.Module):
    """A model compiled to learn on a stream: ``for result in pipe.learn(samples): ...``.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names. The
    optimizers live with the stages. Workers start with the first sample and end with ``close()``,
    at the end of a ``with`` block, or when the pipeline is garbage collected.
    """

    _model: nn.Module

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
        costs: tuple[StageCost, ...],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: names stay the model's own
        self._learn, self._retarget, self._options = learn, retarget, options
        self._arguments = Arguments(learn.package)
        self._executor: ExecutorName = executor
        self._watching: dict[str, Any] = {"hang_seconds": hang_seconds, "throttle": throttle}
        self._costs = costs
        self._weights = ModelWeights(learn.package.state, learn.owned, tensors, model)
        self._learner: Learner | None = None
        self._stale = False
        self._carried: tuple[dict[str, Any], dict[str, Any], int | None] = {}, {}, None
        self._run: LearnRun | None = None
        self._samples = 0
        self._closed = ""
        self._lock = threading.RLock()

    @property
    def plan(self) -> Plan:
        """Which layers run where."""
        return self._learn.package.plan

    @property
    def program(self) -> Program:
        """The schedule as data."""
        return self._learn.package.program

    @property
    def learn_package(self) -> LearnPackage:
        """The generated modules and what belongs to them."""
        return self._learn

    @property
    def rule(self) -> Rule:
        """How it learns: ``rule.delay(stage, stages)`` is the delay of a stage in updates."""
        return self._learn.rule

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Measured costs of the stages, for one sample."""
        return self._costs

    @property
    def samples(self) -> int:
        """How many samples have been taken in since the pipeline was made."""
        return self._samples if self._run is None else self._run.submitted

    def learn(self, samples: Iterable[Any]) -> Generator[Learned]:
        """Results for a source of (input, target) pairs, in order, while later samples are under way.

        An input is a tensor, a tuple of positional arguments or a dict of keyword arguments, as in
        the examples. A target is a tensor or a nest of tensors, always of the same shapes, or None:
        predict, do not learn. A result comes when the loss of its sample is known; its own update
        may still be under way in earlier stages. When the iteration is over, all updates are made.
        Ended early, it computes and updates what is inside, and drops those results.

        Raises:
            InputError: from ``next()``, naming the sample, if one does not fit; at once if another
                stream is under way.
            StepError: if a stage or the loss raises, or a loss is not finite; the pipeline is closed then.
            WorkerDied, WorkerHung, PipelineError: if a device is lost; the pipeline is closed then.
            Exception: what the source raised, after the results of all it gave before.
        """
        with self._lock:
            self._check()
            if self._run is not None:
                raise InputError("a stream is under way: one learn() at a time")
            run = self._run = LearnRun(iter(samples), self._prepare, self, self._samples, self.rule.accumulate)
        return self._results(run)

    def _results(self, run: LearnRun) -> Generator[Learned]:
        try:
            more = True
            while more or run.results:
                with self._lock:
                    while more and not run.results:
                        more = self._turn(run)
                    ready = [self._learned(run) for _ in range(len(run.results))]
                yield from ready
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
        finally:
            self._samples = run.submitted
            if self._run is run:
                self._run = None

    def _turn(self, run: LearnRun) -> bool:
        try:
            return run.turn()
        except Exception as error:
            self._fail(error)
            raise

    def _learned(self, run: LearnRun) -> Learned:
        outcome: Outcome = run.results.popleft()
        seq, run.delivered = run.delivered, run.delivered + 1
        output = unflatten(self._learn.package.out_tree, list(outcome.outputs))
        loss = None if outcome.status == PREDICTED else outcome.loss
        return Learned(seq, output, loss, outcome.versions, outcome.times, outcome.status == SKIPPED)

    def _prepare(self, item: Any, sample: int) -> tuple[list[Any], list[Any] | None]:
        """See :data:`pipecompile.learn_run.Prepare`."""
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"sample {sample} is no pair (input, target); the target may be None")
        value, target = item
        try:
            leaves = self._arguments.of_item(value)
            flat = None if target is None else self._target(target)
        except InputError as error:
            raise InputError(f"sample {sample}: {error}") from error
        return [leaf.detach() for leaf in leaves], flat

    def _target(self, target: Any) -> list[Any]:
        leaves, tree = flatten(target)
        spec = self._learn.target
        if spec is None:
            # The first target there is says what all are like; nothing has been learned until now.
            self._learn = self._retarget(target)
            self._stale = self._learner is not None
            return leaves
        if tree != spec.tree:
            raise InputError(f"its target has another structure than that of the first: {type(target).__name__}")
        for leaf, wanted in zip(leaves, spec.leaves, strict=True):
            if tuple(leaf.shape) != wanted.shape or leaf.dtype is not wanted.torch_dtype:
                raise InputError(
                    f"its target is a {leaf.dtype} tensor of shape {tuple(leaf.shape)}; the first was "
                    f"{wanted.torch_dtype} of shape {wanted.shape}, and all must be alike"
                )
        return [leaf.detach() for leaf in leaves]

    def snapshot(self) -> dict[str, Any]:
        """Weights, buffers and optimizer after one update, the same in every stage; also while learning.

        While a stream is under way it is taken as the next sample passes (with accumulation, the last
        sample of the next update): more samples may be read from the source meanwhile, and learning
        goes on. Any thread may call it.

        Returns:
            ``model``: a copy of the model's ``state_dict``, buffers as after the forward of that
            sample; ``optimizer``: state of one plain torch optimizer over ``model.parameters()``;
            ``samples`` and ``updates``: how many lie before it. ``torch.save`` takes it.

        Raises:
            StepError, WorkerDied, WorkerHung, PipelineError: if the pipeline is lost meanwhile.
        """
        with self._lock:
            self._check()
            run = self._run
            if run is not None:
                wanted = run.mark()
                while (parts := run.parts(wanted, self._learn.stages)) is None and self._turn(run):
                    pass
                if parts is not None:
                    return self._assembled(parts, wanted + 1)
            states = [] if self._learner is None else self._learner.states()
            return self._assembled(states, self.samples)

    def load_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Go on where :meth:`snapshot` was taken, in this pipeline or in one cut otherwise.

        The stream must be given from sample ``snapshot["samples"]`` on. The first forwards then read the
        newest weights, as at the beginning of any stream.

        Raises:
            InputError: if a stream is under way, or it is a snapshot of another model.
        """
        with self._lock:
            self._check()
            if self._run is not None:
                raise InputError("a stream is under way: load a snapshot before or after it")
            self._model.load_state_dict(snapshot["model"])
            state, settings = self._weights.unpacked(snapshot["optimizer"])
            self._carried = state, settings, int(snapshot["updates"])
            if self._learner is not None:
                self._learner.load(*self._carried)
            self._samples = int(snapshot["samples"])

    def set_optimizer(self, **settings: Any) -> None:
        """Change settings of the optimizers from the next stream on: ``pipe.set_optimizer(lr=0.01)``.

        Raises:
            InputError: if a stream is under way.
        """
        with self._lock:
            self._check()
            if self._run is not None:
                raise InputError("a stream is under way: change settings before or after it")
            state, known, version = self._carried
            self._carried = state, {**known, **settings}, version
            if self._learner is not None:
                self._learner.load({}, settings, None)

    def _assembled(self, parts: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
        """A snapshot from what the stages say."""
        versions = {part["version"] for part in parts if "version" in part and part.get("groups")}
        if len(versions) > 1:
            raise PipelineError(f"the parts of a snapshot are of different versions: {sorted(versions)}")
        tensors = {name: value for part in parts for name, value in part.get("tensors", {}).items()}
        state = {name: value for part in parts for name, value in part.get("state", {}).items()}
        groups = {name: value for part in parts for name, value in part.get("groups", {}).items()}
        return {
            "model": self._weights.state_dict(tensors),
            "optimizer": self._weights.packed(copy.deepcopy(state), groups),
            "samples": samples,
            "updates": max(versions, default=0),
        }

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

    def __enter__(self) -> LearningPipeline:
        """Close the pipeline at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipeline."""
        self.close()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, in this process, in the mode it is in: for evaluation between streams."""
        return self._model(*args, **kwargs)

    def train(self, mode: bool = True) -> LearningPipeline:
        """The model's own mode; ``learn`` always trains."""
        self.training = mode
        self._model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's ``state_dict``; while a stream is under way that of a :meth:`snapshot`, without arguments."""
        if self._run is not None and not args and not kwargs:
            return self.snapshot()["model"]
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; counts from the next stream on."""
        return self._model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The model's parameters under its own names."""
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """The model's buffers under its own names."""
        return self._model.named_buffers(*args, **kwargs)

    def extra_repr(self) -> str:
        """Model, stages, devices and rule."""
        devices = ", ".join(device.name for device in self.plan.cluster.devices)
        name = self._learn.package.model
        return f"{name}, {len(self.plan.stages)} stages on {devices}, {self.program.schedule}"

    def _check(self) -> None:
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}")

    def _fail(self, error: BaseException) -> None:
        self._closed = (
            self._closed or f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
        if self._learner is not None:
            self._learner.close()

    @property
    def stale(self) -> bool:
        """See :class:`pipecompile.learn_run.Executors`."""
        return self._stale

    def ready(self) -> Learner:
        """See :class:`pipecompile.learn_run.Executors`."""
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
            if self._carried != ({}, {}, None):
                self._learner.load(*self._carried)
        elif self._weights.moved():
            raise InputError(
                "the model's parameters were replaced (assign=True, .double(), .to()): compile again, or load values "
                "in place with load_state_dict"
            )
        return self._learner


__all__ = ["LearningPipeline"]
