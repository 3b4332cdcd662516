"""What users hold in training: a compiled model whose ``train_step`` runs forward, backward and update."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, PipelineClosed
from pipecompile.ir.cluster import Link
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost, StepPackage, StepRequest
from pipecompile.model_weights import ModelWeights
from pipecompile.runtime.batches import Reduction, loss_weights, split_inputs, split_targets
from pipecompile.runtime.inline_step import InlineTrainer, Trainer
from pipecompile.runtime.process_step import ProcessTrainer
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.simulate.step import simulate_step

ExecutorName = Literal["process", "inline"]


class TrainingPipeline(nn.Module):
    """A model compiled for training. ``loss = pipe.train_step(inputs, targets)`` is one step.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names. The
    optimizer lives with the stages. Workers start at the first step and end with ``close()``, at the
    end of a ``with`` block, or when the pipeline is garbage collected.
    """

    _model: nn.Module

    def __init__(
        self,
        step: StepPackage,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        optimizer: OptimizerFactory,
        *,
        reduction: Reduction = "auto",
        executor: ExecutorName = "process",
        seed: int = 0,
        clip_norm: float | None = None,
        keep_gradients: bool = False,
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
        costs: tuple[StageCost, ...],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: names stay the model's own
        self._step, self._loss_fn, self._optimizer = step, loss_fn, optimizer
        batch_dims = [(i, 0) for i, cut in enumerate(step.batched) if cut and step.package.symbols]
        self._arguments = Arguments(step.package, batch_dims)
        self._reduction: Reduction = reduction
        self._options: dict[str, Any] = {"seed": seed, "keep_gradients": keep_gradients}
        self._watching: dict[str, Any] = {"hang_seconds": hang_seconds, "throttle": throttle}
        self._clip, self._costs = clip_norm, costs
        self._executor = executor
        self._weights = ModelWeights(step.package.state, step.owned, tensors, model)
        self._trainer: Trainer | None = None
        self._steps = 0
        self._closed = ""
        self._lock = threading.RLock()

    @property
    def plan(self) -> Plan:
        """Which layers run where."""
        return self._step.package.plan

    @property
    def program(self) -> Program:
        """One training step as data."""
        return self._step.package.program

    @property
    def step_package(self) -> StepPackage:
        """The generated modules and what belongs to them."""
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
            StepError: if a stage or the loss raises; the pipeline is closed then.
        """
        with self._lock:
            leaves = self._split(inputs)
            sizes = [self._samples(row) for row in leaves]
            parts = split_targets(targets, sum(sizes), len(leaves))
            weights = loss_weights(self._loss_fn, parts, sizes, self._reduction)
            trainer = self._ready()
            request = StepRequest(self._steps, leaves, parts, weights, update, self._clip)
            try:
                losses = trainer.step(request)
            except Exception as error:
                self._closed = f"it failed: {str(error).splitlines()[0]}"
                trainer.close()
                raise
            self._steps += 1
            return torch.stack(losses).sum()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the last update under the model's names (compiled with ``keep_gradients=True``)."""
        if not self._options["keep_gradients"]:
            raise InputError("gradients are not kept: compile with keep_gradients=True")
        found = self._ready().gradients()
        return {self._weights.fqn(name): gradient for name, gradient in found.items()}

    def simulate(self) -> Timeline:
        """What one step is predicted to look like, from the measured costs of the stages."""
        return simulate_step(self.program, self._costs, self.plan.cluster.link, cluster=self.plan.cluster)

    def optimizer_state_dict(self) -> dict[str, Any]:
        """A copy of the optimizers' state as that of one plain torch optimizer over ``model.parameters()``."""
        return self._weights.packed(*copy.deepcopy(self._ready().optimizer_state()))

    def load_optimizer_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of a plain torch optimizer over ``model.parameters()`` with one group.

        Raises:
            InputError: if it has several parameter groups, or another number of parameters.
        """
        self._ready().load_optimizer_state(*self._weights.unpacked(state_dict))

    def training_state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides ``state_dict()``: the optimizers' state and the number of steps done."""
        return {"optimizer": self.optimizer_state_dict(), "steps": self._steps}

    def load_training_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`training_state_dict` was taken: random masks follow the number of steps."""
        self.load_optimizer_state_dict(state_dict["optimizer"])
        self._steps = int(state_dict["steps"])

    def set_optimizer(self, **settings: Any) -> None:
        """Change settings of the optimizers from the next step on: ``pipe.set_optimizer(lr=0.01)``."""
        self._ready().set(settings)

    def close(self) -> None:
        """End. Closing twice is fine; parameters and buffers stay usable."""
        if self._trainer is not None:
            self._trainer.close()
        self._closed = self._closed or "it was closed"

    def __enter__(self) -> TrainingPipeline:
        """Close the pipeline at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipeline."""
        self.close()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, in this process, in the mode it is in: for evaluation between steps."""
        return self._model(*args, **kwargs)

    def train(self, mode: bool = True) -> TrainingPipeline:
        """The model's own mode; ``train_step`` always trains."""
        self.training = mode
        self._model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's ``state_dict``."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; counts from the next step on."""
        return self._model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The model's parameters under its own names."""
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """The model's buffers under its own names."""
        return self._model.named_buffers(*args, **kwargs)

    def extra_repr(self) -> str:
        """Model, stages, devices and schedule."""
        devices = ", ".join(device.name for device in self.plan.cluster.devices)
        name = self._step.package.model
        return (
            f"{name}, {len(self.plan.stages)} stages on {devices}, {self.program.schedule}, {self.micro_batches} parts"
        )

    def _split(self, inputs: Any) -> list[list[Any]]:
        """Flat inputs per micro-batch, each checked as a call of what was compiled."""
        package, parts = self._step.package, self.micro_batches
        leaves = self._arguments.flat(inputs)
        wanted = [spec.shape[0] if cut else None for spec, cut in zip(package.inputs, self._step.batched, strict=True)]
        sizes = {leaf.shape[0] for leaf, size in zip(leaves, wanted, strict=True) if size is not None and leaf.dim()}
        if len(sizes) != 1:
            raise InputError(f"the inputs have batches of {sorted(sizes)} samples: all must have as many")
        (batch,) = sizes
        fixed = next(size for size in wanted if size is not None)
        if not package.symbols and batch != fixed * parts:
            raise InputError(
                f"a batch of {batch} samples, compiled for {fixed * parts}: {parts} micro-batches of {fixed}. Pass "
                "that many, or compile with an example batch that micro_batches does not divide: then sizes may differ"
            )
        if batch < parts:
            raise InputError(
                f"a batch of {batch} samples cannot be split into {parts} micro-batches: compile for fewer"
            )
        rows = split_inputs(leaves, self._step.batched, parts)
        for row in rows:
            self._arguments.check(row)
        return rows

    def _samples(self, row: list[Any]) -> int:
        return next(leaf.shape[0] for leaf, cut in zip(row, self._step.batched, strict=True) if cut)

    def _ready(self) -> Trainer:
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}")
        if self._trainer is None:
            tensors = self._weights.current()
            if self._executor == "inline":
                self._trainer = InlineTrainer(self._step, tensors, self._loss_fn, self._optimizer, **self._options)
            else:
                self._trainer = ProcessTrainer(
                    self._step, tensors, self._loss_fn, self._optimizer, **self._options, **self._watching
                )
            self._weights.remember()
        elif self._weights.moved():
            raise InputError(
                "the model's parameters were replaced (assign=True, .double(), .to()): compile again, or load values "
                "in place with load_state_dict"
            )
        return self._trainer


__all__ = ["TrainingPipeline"]
