"""What a learning pipeline goes on from: weights, buffers, optimizers and how many samples lie before."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipelineClosed
from pipecompile.ir.learning import LearnPackage, Rule
from pipecompile.ir.package import Package
from pipecompile.ir.sample import Counts
from pipecompile.ir.training import StageCost
from pipecompile.pipelines.facade import LearnsInPlace
from pipecompile.pipelines.learn_run import LearnRun
from pipecompile.pipelines.learn_state import LearnState
from pipecompile.pipelines.model_weights import ModelWeights
from pipecompile.runtime.learn import LearnOptions
from pipecompile.runtime.learn_host import Learner
from pipecompile.runtime.update import settings_of


class LearningState(LearnsInPlace):
    """A pipeline with a learner, which has the optimizers, and with all that another one can go on from."""

    def __init__(
        self,
        learn: LearnPackage,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        options: LearnOptions,
        costs: tuple[StageCost, ...],
    ) -> None:
        super().__init__(model)
        self._learn, self._options, self._costs = learn, options, costs
        self._weights = ModelWeights(learn.package.state, learn.owned, tensors, model)
        self._state = LearnState(self._weights, model)
        self._learner: Learner | None = None
        self._run: LearnRun | None = None
        self._samples = 0
        self._counted = Counts()
        self._closed = ""
        self._lock = threading.RLock()

    @property
    def package(self) -> Package:
        """The generated modules."""
        return self._learn.package

    @property
    def learn_package(self) -> LearnPackage:
        """The package and what learning needs besides."""
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

    @property
    def counts(self) -> Counts:
        """Where all samples are that sources have given; of one moment. What failed or was not taken is dropped."""
        run, before = self._run, self._counted
        if run is None:
            return before
        # Delivered first: a count that is taken later can only be higher.
        delivered, dropped = before.delivered + run.delivered, before.dropped + run.source.dropped
        submitted = before.submitted + run.source.offered
        return Counts(submitted, delivered, dropped, 0, submitted - delivered - dropped)

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
                    return self._state.assembled(parts, wanted + 1)
            return self._state.snapshot(self._learner, self.samples)

    def load_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Go on where :meth:`snapshot` was taken, in this pipeline or in one cut otherwise.

        The stream must be given from sample ``snapshot["samples"]`` on. The first forwards then read the
        newest weights, as at the beginning of any stream.

        Raises:
            InputError: if a stream is under way, or it is a snapshot of another model.
        """
        with self._lock:
            self._idle()
            self._state.put_back(snapshot, self._learner)
            self._samples = int(snapshot["samples"])
            self._counted = Counts(self._samples, self._samples)  # numbers go on as there

    def set_optimizer(self, **settings: Any) -> None:
        """Change settings of the optimizers from the next stream on: ``pipe.set_optimizer(lr=0.01)``.

        Raises:
            InputError: if a stream is under way, or there is no such setting.
        """
        with self._lock:
            self._idle()
            known = settings_of(self._options.optimizer)
            unknown = sorted(settings.keys() - known)
            if unknown:
                raise InputError(f"the optimizer has no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
            self._state.set(settings, self._learner)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; counts from the next stream on.

        Raises:
            InputError: while a stream is under way.
        """
        self._idle()
        return super().load_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's ``state_dict``; while a stream is under way that of a :meth:`snapshot`, without arguments."""
        if self._run is not None and not args and not kwargs:
            return self.snapshot()["model"]
        return super().state_dict(*args, **kwargs)

    @abstractmethod
    def _turn(self, run: LearnRun) -> bool:
        """Let a stream go on by one turn; whether there is more to come."""

    def _idle(self) -> None:
        with self._lock:
            self._check()
            if self._run is not None:
                raise InputError("a stream is under way: one learn() at a time, and nothing else meanwhile")

    def _check(self) -> None:
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}")


__all__ = ["LearningState"]
