"""What users hold in training: a compiled model whose ``train_step`` runs forward, backward and update."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, NonFiniteError, PipelineClosed, StepError
from pipecompile.ir.cluster import Link
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost, StepPackage, StepRequest, of_parts
from pipecompile.pipelines.checkpoint import Checkpoint
from pipecompile.pipelines.drop_in import DropIn
from pipecompile.pipelines.model_weights import ModelWeights
from pipecompile.pipelines.param_groups import ModelGroups
from pipecompile.pipelines.train_artefact import SavedTraining
from pipecompile.pipelines.training_state import TrainingState
from pipecompile.pipelines.user_code import check_code
from pipecompile.runtime.batches import Reduction, loss_weights, moved, parts_of, split_inputs, split_targets
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.not_finite import origin
from pipecompile.runtime.step_spans import step_timeline
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.simulate.step import simulate_step
from pipecompile.streams.engine import ExecutorName


class TrainingPipeline(TrainingState):
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
        weights = ModelWeights(step.package.state, step.owned, tensors, model, groups)
        training = Training(loss_fn, optimizer, seed, keep_gradients, check_finite, weights.groups(), full_loss)
        super().__init__(
            step,
            model,
            weights,
            training,
            costs,
            reduction=reduction,
            clip_norm=clip_norm,
            executor=executor,
            watching={"hang_seconds": hang_seconds, "throttle": throttle},
            resume=resume,
        )
        self._loss_fn = loss_fn
        batch_dims = [(i, 0) for i, cut in enumerate(step.batched) if cut and step.package.symbols]
        self._arguments = Arguments(step.package, batch_dims)
        self._drop_in = DropIn(step, tensors)

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
                if trainer.closed and not isinstance(error.__cause__, torch.AcceleratorError):
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
        if (card := package.plan.cluster.card) is not None:
            rows = [moved(row, card) for row in request.leaves]
            request = replace(request, leaves=rows, targets=[moved(target, card) for target in request.targets])
        criterion.targets, criterion.weights = request.targets, request.weights
        return origin(self._step, self._weights.current(), criterion, request, error.micro_batch, self._training.seed)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update under the model's names (compiled with ``keep_gradients=True``)."""
        if not self._training.keep_gradients:
            raise InputError("gradients are not kept: compile with keep_gradients=True")
        found = self._ready().gradients()
        return {self._weights.fqn(name): gradient for name, gradient in found.items()}

    def simulate(self, micro_batches: int | None = None) -> Timeline:
        """What one step is predicted to look like, from the measured costs of the stages.

        Args:
            micro_batches: of a smaller batch; each takes as long as one of the example.
        """
        program = self.program if micro_batches is None else of_parts(self.program, micro_batches)
        return simulate_step(program, self._costs, self.plan.cluster.link, cluster=self.plan.cluster)

    def timeline(self) -> Timeline:
        """What the devices did in the latest step, as measured; waits and messages only where they are processes.

        Raises:
            InputError: if the latest step is not over, failed, or there was none.
            PipelineClosed: if the workers that know have ended.
        """
        if self._trainer is not None and self._trainer.closed:
            raise PipelineClosed("the workers that know what the latest step was have ended: ask before close()")
        found = self._latest()
        if found is None:
            raise InputError("there is no timeline: no step has run, or the latest failed or waits for its backward()")
        return found

    def _latest(self) -> Timeline | None:
        """The latest step, if it was a whole one and its workers live."""
        with self._lock:
            trainer = self._trainer
            spans = [] if trainer is None or trainer.closed else trainer.spans()
            return step_timeline(self.program, spans) if spans else None

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML page: the latest step beside the predicted one, stages, transfers, notes.

        Where there is no whole step to show, as before the first and after ``close()``, it shows the prediction
        alone. Predicted is a step of as many micro-batches, each as large as that of the example.

        Raises:
            InputError: if the file cannot be written.
        """
        from pipecompile.report.page import write_page
        from pipecompile.report.step_html import step_html

        latest = self._latest()
        return write_page(path, step_html(self.package, self.simulate(self._parts(latest)), self.costs, latest))

    def _parts(self, latest: Timeline | None) -> int | None:
        """How many micro-batches a step had; None for all, and where pipelines got different numbers of them."""
        if latest is None:
            return None
        copies = self.plan.data_parallel
        parts = sum(event.activity == "F" for event in latest.events) * copies // len(self.plan.stages)
        return None if parts % copies else parts

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
        """Model, stages, devices, schedule and micro-batches."""
        count = self.micro_batches
        return f"{super().extra_repr()}, {count} micro-batch{'es' if count > 1 else ''}"

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
    check_code(loss_fn, optimizer, executor)
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
