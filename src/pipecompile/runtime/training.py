"""What the caller wants of every training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipecompile.ir.tree import Tree
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.groups import ParameterGroups
from pipecompile.runtime.update import Board, DeviceUpdates, Handover, OptimizerFactory


@dataclass(frozen=True)
class Training:
    """Loss, optimizer and options. Without an optimizer the caller has both, and gets gradients.

    ``seed`` is that of random masks; ``keep_gradients`` keeps those of the last update;
    ``check_finite`` stops a step before its update when a loss or gradients are NaN or infinite;
    ``full_loss`` gives the loss float32 where the model's results are of half that (autocast).
    """

    loss_fn: Callable[[Any, Any], Any] | None
    optimizer: OptimizerFactory | None
    seed: int = 0
    keep_gradients: bool = False
    check_finite: bool = False
    groups: ParameterGroups = field(default_factory=ParameterGroups)
    full_loss: bool = False

    def criterion(self, out_tree: Tree) -> Criterion | None:
        """The loss, for the device with the last stage."""
        if self.loss_fn is None:
            return None
        return Criterion(self.loss_fn, out_tree, finite=self.check_finite, full=self.full_loss)

    def updates(
        self,
        device: int,
        owned: Mapping[int, Sequence[str]],
        tensors: Mapping[str, torch.Tensor],
        board: Board,
        places: Mapping[str, torch.Tensor] | None = None,
    ) -> DeviceUpdates | Handover:
        """What a device does with its gradients; ``places`` is where the caller looks for them."""
        if self.optimizer is None:
            return Handover(owned, places)
        return DeviceUpdates(
            device, owned, tensors, self.optimizer, board, finite=self.check_finite, keep=self.keep_gradients,
            groups=self.groups,
        )  # fmt: skip


__all__ = ["Training"]
