"""What every compiled model is to its user: an nn.Module with the model's own weights, a plan, and an end."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from pipecompile.errors import InputError
from pipecompile.ir.package import Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program


class Pipeline(nn.Module):
    """The part that pipelines of all modes have in common.

    Parameters and buffers are the model's, under its own names: the model is held, but no submodule.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)

    @property
    def package(self) -> Package:
        """The generated modules and what belongs to them, without the weights."""
        raise NotImplementedError

    @property
    def plan(self) -> Plan:
        """Which layers run where, and what that is predicted to cost."""
        return self.package.plan

    @property
    def program(self) -> Program:
        """The schedule as data."""
        return self.package.program

    def close(self) -> None:
        """End the workers. Closing twice is fine; parameters and buffers stay usable."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Close the pipeline at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipeline."""
        self.close()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's ``state_dict``."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; counts from the next sample, step or stream on."""
        return self._model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The model's parameters under its own names."""
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """The model's buffers under its own names."""
        return self._model.named_buffers(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What ``to()``, ``half()``, ``double()`` and the like come down to.

        Raises:
            InputError: if a parameter or buffer would have another dtype or device: the stages are compiled for these.
        """
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            with torch.no_grad():
                changed = fn(tensor.detach())
            if changed.dtype != tensor.dtype or changed.device != tensor.device:
                raise InputError(
                    f"{name} is {tensor.dtype} on {tensor.device}, for which this pipeline was compiled, and would be "
                    f"{changed.dtype} on {changed.device}: convert the model, and compile it again"
                )
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: it holds running workers.

        Raises:
            TypeError: always; Python's own answer would name a lock within.
        """
        raise TypeError(
            f"a {type(self).__name__} holds running workers and cannot be copied or pickled: save() it and load() it "
            "there, or copy the model"
        )

    def extra_repr(self) -> str:
        """Model, stages and devices."""
        devices = self.plan.cluster.devices
        names = ", ".join(d.name if d.threads == 1 else f"{d.name} ({d.threads} threads)" for d in devices)
        return f"{self.package.model}, {self.plan.shape} on {names}"


class LearnsInPlace(Pipeline):
    """A pipeline whose model is trained, and has a mode of its own for evaluation in this process."""

    def train(self, mode: bool = True) -> Self:
        """The model's own mode, for calls in this process; steps and streams always train."""
        self.training = mode
        self._model.train(mode)
        return self

    def extra_repr(self) -> str:
        """Model, stages, devices and schedule."""
        return f"{super().extra_repr()}, {self.program.schedule}"


__all__ = ["LearnsInPlace", "Pipeline"]
