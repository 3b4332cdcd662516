"""What a training pipeline goes on from: weights, optimizers and the number of steps, saved and loaded."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipelineClosed
from pipecompile.ir.package import Package
from pipecompile.ir.training import StageCost, StepPackage
from pipecompile.pipelines.checkpoint import Checkpoint
from pipecompile.pipelines.facade import LearnsInPlace
from pipecompile.pipelines.model_weights import ModelWeights
from pipecompile.pipelines.optimizer_shapes import StateShapes
from pipecompile.pipelines.train_artefact import SavedTraining
from pipecompile.runtime.batches import Reduction
from pipecompile.runtime.cuda import lanes_of
from pipecompile.runtime.inline_step import InlineTrainer, Trainer
from pipecompile.runtime.process_step import ProcessTrainer
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import settings_of
from pipecompile.streams.engine import ExecutorName


class TrainingState(LearnsInPlace):
    """A pipeline with a trainer, which has the optimizers, and with all that another one can go on from.

    ``watching`` are options of worker processes, ``resume`` is what was saved with an artefact.
    """

    def __init__(
        self,
        step: StepPackage,
        model: nn.Module,
        weights: ModelWeights,
        training: Training,
        costs: tuple[StageCost, ...],
        *,
        reduction: Reduction,
        clip_norm: float | None,
        executor: ExecutorName,
        watching: Mapping[str, Any],
        resume: Checkpoint | None,
    ) -> None:
        super().__init__(model)
        self._step, self._weights, self._training, self._costs = step, weights, training, costs
        self._reduction: Reduction = reduction
        self._clip, self._executor, self._watching = clip_norm, executor, watching
        self._known = frozenset[str]() if training.optimizer is None else settings_of(training.optimizer)
        self._trainer: Trainer | None = None
        self._steps, self._accumulated = 0 if resume is None else resume.steps, False
        self._resume = None if resume is None else resume.optimizer
        self._closed = ""
        self._lock = threading.RLock()

    @property
    def package(self) -> Package:
        """The generated modules, with one micro-batch as their sample."""
        return self._step.package

    @property
    def step_package(self) -> StepPackage:
        """The package and what a step needs besides."""
        return self._step

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a batch is split into."""
        return self._step.micro_batches

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Measured costs of the stages, for one micro-batch."""
        return self._costs

    def optimizer_state_dict(self) -> dict[str, Any]:
        """A copy of the optimizers' state as that of one plain torch optimizer over ``model.parameters()``.

        Compiled with ``param_groups=``, as that of one with the same groups.
        """
        return self._weights.packed(*copy.deepcopy(self._ready().optimizer_state()))

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a plain torch optimizer over ``model.parameters()``, or with the same groups.

        Raises:
            InputError: if it has other parameter groups, another number of parameters, other settings, or state
                of other shapes; nothing is changed then.
        """
        self._load_optimizer(state_dict, "the optimizer state")

    def _load_optimizer(self, state_dict: Mapping[str, Any], source: object) -> None:
        """As :meth:`load_optimizer_state_dict`; ``source`` is where it is from."""
        state, settings = self._weights.unpacked(state_dict)
        for group in settings:
            missing, unknown = sorted(self._known - group.keys()), sorted(group.keys() - self._known - {"initial_lr"})
            if missing and unknown:
                raise InputError(
                    f"this is the state of another kind of optimizer: it has {', '.join(unknown)} and no "
                    f"{', '.join(missing)}"
                )
        if self._training.optimizer is not None:
            StateShapes(self._training.optimizer).check(self._weights.with_names(state), source)
        self._ready().load_optimizer_state(state, settings)

    def training_state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides ``state_dict()``: the optimizers' state and the number of steps done."""
        return {"optimizer": self.optimizer_state_dict(), "steps": self._steps}

    def load_training_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`training_state_dict` was taken: random masks follow the number of steps."""
        self.load_optimizer_state_dict(state_dict["optimizer"])
        self._steps = int(state_dict["steps"])

    def save_checkpoint(
        self, path: str | os.PathLike[str], *, optimizer: torch.optim.Optimizer | None = None, extra: Any = None
    ) -> None:
        """Save weights, buffers, the optimizers' state and the number of steps to one file, whole or not at all.

        A crash while saving leaves the old file as it was. :meth:`load_checkpoint` goes on bit for bit.

        Args:
            path: a safetensors file; replaced if it exists.
            optimizer: the caller's own, where the pipeline has none (compiled without a loss).
            extra: JSON data to keep with it, such as an epoch or a scheduler's ``state_dict()``.

        Raises:
            InputError: while gradients of ``update=False`` steps wait for their update, which a
                checkpoint does not hold; or if something is not JSON.
        """
        with self._lock:
            self._settled()
            own = self._training.optimizer is not None
            if own == (optimizer is not None):
                raise InputError(
                    "optimizer= is for a pipeline compiled without a loss: this one has its own"
                    if own
                    else "this pipeline has no optimizer: give yours as optimizer="
                )
            state = self.optimizer_state_dict() if optimizer is None else optimizer.state_dict()
            Checkpoint(self._model.state_dict(), state, self._steps, extra).save(path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the pipeline to a folder that ``pipecompile.load(path, mode="train", ...)`` goes on from bit for bit.

        It holds generated code, weights, buffers, the optimizers' state, the number of steps and the options;
        the loss and the optimizer are given again when it is loaded, and so is a ``reduction`` that is a function.
        The state of an optimizer of the caller's is not in it (:meth:`save_checkpoint` takes that).

        Raises:
            ArtefactError: if the folder cannot be written or holds something else.
            InputError: while gradients of ``update=False`` steps wait for their update; or if it runs on a card.
        """
        if self.package.plan.cluster.card is not None:
            raise InputError("a pipeline on a card cannot be saved yet, only its state: use save_checkpoint()")
        with self._lock:
            self._settled()
            training = self._training
            options = {
                "own": training.optimizer is not None,
                "reduction": None if callable(self._reduction) else self._reduction,
                "seed": training.seed,
                "clip_norm": self._clip,
                "keep_gradients": training.keep_gradients,
                "check_finite": training.check_finite,
                "full_loss": training.full_loss,
                "groups": self._weights.groups_by_name(),
            }
            state = None if training.optimizer is None else self.optimizer_state_dict()
            resume = Checkpoint({}, state, self._steps)
            return SavedTraining(self._step, self._weights.current(), self._costs, options, resume).save(path)

    def _settled(self) -> None:
        if self._accumulated:
            raise InputError(
                "gradients of train_step(update=False) wait for their update, and what is saved does not hold "
                "them: save after a step that updates"
            )

    def load_checkpoint(self, path: str | os.PathLike[str], *, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Go on from :meth:`save_checkpoint`, on any number of devices and under any schedule.

        Returns:
            What was given as ``extra``.

        Raises:
            ArtefactError: if the file is not a whole checkpoint.
            InputError: if it is of another model or another optimizer; nothing is changed then.
        """
        with self._lock:
            found = Checkpoint.load(path)
            found.fits(self._model.state_dict(), path)
            if found.optimizer is not None and optimizer is not None:
                StateShapes.like(optimizer).check(self._weights.of_optimizer(optimizer, found.optimizer), path)
                optimizer.load_state_dict(dict(found.optimizer))
            elif found.optimizer is not None:
                self._load_optimizer(found.optimizer, path)
            self._model.load_state_dict(found.model)
            self._steps = found.steps
            return found.extra

    def set_optimizer(self, group: int | None = None, /, **settings: Any) -> None:
        """Change settings of the optimizers from the next step on: ``pipe.set_optimizer(lr=0.01)``.

        ``pipe.set_optimizer(1, lr=0.01)`` changes one of ``param_groups``, counted from 0.

        Raises:
            InputError: if there is no such group, or no such setting.
        """
        groups = len(self._training.groups.settings)
        if group is not None and not 0 <= group < groups:
            raise InputError(f"there is no parameter group {group}: this pipeline has {groups}, counted from 0")
        unknown = sorted(settings.keys() - self._known)
        if unknown:
            raise InputError(f"the optimizer has no {', '.join(unknown)}; there are {', '.join(sorted(self._known))}")
        self._ready().set(settings, group)

    def close(self) -> None:
        """End. Closing twice is fine; parameters and buffers stay usable."""
        if self._trainer is not None:
            self._trainer.close()
        self._closed = self._closed or "it was closed"

    def _ready(self) -> Trainer:
        closed = self._closed or ("" if self._trainer is None else self._trainer.closed)
        if closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {closed}")
        if self._trainer is None:
            tensors = self._weights.current()
            if self._executor == "inline":
                self._trainer = InlineTrainer(self._step, tensors, self._training, lanes_of(self.package, tensors))
            else:
                self._trainer = ProcessTrainer(self._step, tensors, self._training, **self._watching)
            self._weights.remember()
            if self._resume is not None:
                self._trainer.load_optimizer_state(*self._weights.unpacked(self._resume))
                self._resume = None
        elif self._weights.moved():
            raise InputError(
                "the model's parameters were replaced (assign=True, .double(), .to()): compile again, or load values "
                "in place with load_state_dict"
            )
        return self._trainer


__all__ = ["TrainingState"]
