"""What users hold in training: a compiled model whose ``train_step`` runs forward, backward and update."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, NonFiniteError, PipelineClosed, StepError
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import Package
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost, StepPackage, StepRequest
from pipecompile.pipelines.checkpoint import Checkpoint
from pipecompile.pipelines.drop_in import DropIn
from pipecompile.pipelines.facade import LearnsInPlace
from pipecompile.pipelines.model_weights import ModelWeights
from pipecompile.pipelines.param_groups import ModelGroups
from pipecompile.pipelines.train_artefact import SavedTraining
from pipecompile.runtime.batches import Reduction, loss_weights, parts_of, split_inputs, split_targets
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.inline_step import InlineTrainer, Trainer
from pipecompile.runtime.not_finite import origin
from pipecompile.runtime.process_step import ProcessTrainer
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import OptimizerFactory, settings_of
from pipecompile.simulate.step import simulate_step
from pipecompile.streams.engine import ExecutorName


class TrainingPipeline(LearnsInPlace):
    """A model compiled for training. ``loss = pipe.train_step(inputs, targets)`` is one step.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names. The
    optimizer lives with the stages. Workers start at the first step and end with ``close()``, at the
    end of a ``with`` block, or when the pipeline is garbage collected.
    """

    def __init__(
        self,
        step: StepPackage,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        optimizer: OptimizerFactory | None,
        *,
        reduction: Reduction = "auto",
        executor: ExecutorName = "process",
        seed: int = 0,
        clip_norm: float | None = None,
        keep_gradients: bool = False,
        check_finite: bool = False,
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
        costs: tuple[StageCost, ...],
        groups: ModelGroups | None = None,
        full_loss: bool = False,
        resume: Checkpoint | None = None,
    ) -> None:
        super().__init__(model)
        self._step, self._loss_fn = step, loss_fn
        batch_dims = [(i, 0) for i, cut in enumerate(step.batched) if cut and step.package.symbols]
        self._arguments = Arguments(step.package, batch_dims)
        self._reduction: Reduction = reduction
        self._watching: dict[str, Any] = {"hang_seconds": hang_seconds, "throttle": throttle}
        self._clip, self._costs = clip_norm, costs
        self._executor = executor
        self._weights = ModelWeights(step.package.state, step.owned, tensors, model, groups)
        self._training = Training(
            loss_fn, optimizer, seed, keep_gradients, check_finite, self._weights.groups(), full_loss
        )
        self._known = frozenset[str]() if optimizer is None else settings_of(optimizer)
        self._drop_in = DropIn(step, tensors)
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

    def train_step(self, inputs: Any, targets: Any = None, *, update: bool = True) -> torch.Tensor:
        """One step: forward and backward of all micro-batches, then one update.

        Args:
            inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, as in
                the examples; batched inputs are split along dimension 0.
            targets: what ``loss_fn`` gets besides the model's result, split likewise; any nest of tensors.
            update: False adds the gradients to those of the next step instead (accumulation).

        Returns:
            The loss of the batch, a tensor of no dimension.

        Raises:
            InputError: if inputs or targets do not match what was compiled.
            StepError: if a stage or the loss raises. Weights, buffers and gradients are as before the
                step, and the pipeline stays usable; unless a stage had updated already, which the
                message says: then it is closed.
            NonFiniteError: as a StepError, for a loss or gradients that are not finite
                (``check_finite=True``).
            WorkerDied: if the process of a device ends; the pipeline is closed then.
        """
        if self._loss_fn is None:
            raise InputError(
                "compiled without loss_fn= and optimizer=, so pipe(x) takes part in autograd: compute the loss, call "
                "backward() and step your optimizer; or compile with both to use train_step()"
            )
        with self._lock:
            leaves = self._split(self._arguments.flat(inputs))
            sizes = [self._samples(row) for row in leaves]
            parts = split_targets(targets, sum(sizes), len(leaves))
            weights = loss_weights(self._loss_fn, parts, sizes, self._reduction)
            trainer = self._ready()
            request = StepRequest(self._steps, leaves, parts, weights, update, self._clip)
            try:
                losses = trainer.step(request)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error} in step {self._steps}: {self._origin(error, request)}. Nothing was updated",
                    micro_batch=error.micro_batch,
                    weights=tuple(self._weights.fqn(name) for name in error.weights),
                ) from None
            except StepError as error:
                if trainer.closed:
                    raise StepError(
                        f"a stage had updated its weights already, the pipeline is closed: {error}"
                    ) from None
                raise
            self._steps += 1
            self._accumulated = not update
            return torch.stack(losses).sum()

    def _origin(self, error: NonFiniteError, request: StepRequest) -> str:
        """Where what is not finite comes from, in words."""
        package = self._step.package
        if error.micro_batch < 0:
            names = [self._weights.fqn(name) for name in error.weights]
            stages = sorted({s for s, own in self._step.owned.items() for name in own if name in error.weights})
            return f"of {', '.join(names)} in stage {', '.join(map(str, stages))}" if names else "it overflowed"
        assert self._loss_fn is not None
        criterion = Criterion(self._loss_fn, package.out_tree, full=self._training.full_loss)
        criterion.targets, criterion.weights = request.targets, request.weights
        return origin(self._step, self._weights.current(), criterion, request, error.micro_batch, self._training.seed)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update under the model's names (compiled with ``keep_gradients=True``)."""
        if not self._training.keep_gradients:
            raise InputError("gradients are not kept: compile with keep_gradients=True")
        found = self._ready().gradients()
        return {self._weights.fqn(name): gradient for name, gradient in found.items()}

    def simulate(self) -> Timeline:
        """What one step is predicted to look like, from the measured costs of the stages."""
        return simulate_step(self.program, self._costs, self.plan.cluster.link, cluster=self.plan.cluster)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """A copy of the optimizers' state as that of one plain torch optimizer over ``model.parameters()``.

        Compiled with ``param_groups=``, as that of one with the same groups.
        """
        return self._weights.packed(*copy.deepcopy(self._ready().optimizer_state()))

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a plain torch optimizer over ``model.parameters()``, or with the same groups.

        Raises:
            InputError: if it has other parameter groups, another number of parameters, or other settings.
        """
        state, settings = self._weights.unpacked(state_dict)
        for group in settings:
            missing, unknown = sorted(self._known - group.keys()), sorted(group.keys() - self._known - {"initial_lr"})
            if missing and unknown:
                raise InputError(
                    f"this is the state of another kind of optimizer: it has {', '.join(unknown)} and no "
                    f"{', '.join(missing)}"
                )
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
            InputError: while gradients of ``update=False`` steps wait for their update.
        """
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
                optimizer.load_state_dict(dict(found.optimizer))
            elif found.optimizer is not None:
                self.load_optimizer_state_dict(found.optimizer)
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for a batch.

        Compiled with a loss this is the model itself, in this process and in the mode it is in: for
        evaluation between steps. Compiled without one, and in train mode with gradients enabled, the
        batch goes through the pipeline, and the result is part of the autograd graph: its backward
        adds to ``.grad`` of the parameters, for an optimizer of the caller's.

        Raises:
            InputError: if inputs do not match what was compiled, or want gradients themselves.
            StepError: if a stage raises.
        """
        if self._loss_fn is not None or not self.training or not torch.is_grad_enabled():
            return self._model(*args, **kwargs)
        with self._lock:
            whole = self._arguments.flat_call(args, kwargs)
            rows = self._split(whole)
            request = StepRequest(self._steps, rows, [None] * len(rows), [1.0] * len(rows))
            result = self._drop_in.call(self._ready, request, whole, [self._samples(row) for row in rows])
            self._steps += 1
            return result

    def extra_repr(self) -> str:
        """Model, stages, devices and schedule."""
        devices = ", ".join(device.name for device in self.plan.cluster.devices)
        name = self._step.package.model
        return (
            f"{name}, {len(self.plan.stages)} stages on {devices}, {self.program.schedule}, {self.micro_batches} parts"
        )

    def _split(self, leaves: list[Any]) -> list[list[Any]]:
        """Flat inputs per micro-batch, each checked as a call of what was compiled."""
        step, package, parts = self._step, self._step.package, self.micro_batches
        wanted = [spec.shape[0] if cut else None for spec, cut in zip(package.inputs, self._step.batched, strict=True)]
        sizes = {leaf.shape[0] for leaf, size in zip(leaves, wanted, strict=True) if size is not None and leaf.dim()}
        if len(sizes) != 1:
            raise InputError(f"the inputs have batches of {sorted(sizes)} samples: all must have as many")
        (batch,) = sizes
        if step.smaller:
            parts = parts_of(batch, step.batch, parts, step.sizes)
        elif batch != step.batch:
            raise InputError(
                f"a batch of {batch} samples, compiled for {step.batch}: {parts} micro-batches of {step.sizes[1]}. "
                "Pass that many, or compile with dynamic_batch=True: then batches may be smaller"
            )
        rows = split_inputs(leaves, step.batched, parts)
        for row in rows:
            self._arguments.check(row)
        return rows

    def _samples(self, row: list[Any]) -> int:
        return next(leaf.shape[0] for leaf, cut in zip(row, self._step.batched, strict=True) if cut)

    def _ready(self) -> Trainer:
        closed = self._closed or ("" if self._trainer is None else self._trainer.closed)
        if closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {closed}")
        if self._trainer is None:
            tensors = self._weights.current()
            if self._executor == "inline":
                self._trainer = InlineTrainer(self._step, tensors, self._training)
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


def resume_training(
    saved: SavedTraining,
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Any] | None,
    optimizer: OptimizerFactory | None,
    *,
    reduction: Reduction | None = None,
    executor: ExecutorName = "process",
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
) -> TrainingPipeline:
    """The pipeline that was saved; ``model`` holds its parameters and buffers.

    Raises:
        InputError: if loss and optimizer are not given as they were, or a reduction is missing.
    """
    options = dict(saved.options)
    own, groups, named = options.pop("own"), options.pop("groups"), options.pop("reduction")
    if (loss_fn is not None, optimizer is not None) != (own, own):
        raise InputError(
            "this pipeline was compiled with a loss and an optimizer: give loss_fn= and optimizer= again"
            if own
            else "this pipeline was compiled without a loss: load it without loss_fn= and optimizer="
        )
    if reduction is None and named is None:
        raise InputError("this pipeline was compiled with a function as reduction=: give it again")
    return TrainingPipeline(
        saved.step,
        saved.tensors,
        model,
        loss_fn,
        optimizer,
        reduction=named if reduction is None else reduction,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        costs=saved.costs,
        groups=None if groups is None else ModelGroups.of(model, groups),
        resume=saved.resume,
        **options,
    )


__all__ = ["TrainingPipeline", "resume_training"]
