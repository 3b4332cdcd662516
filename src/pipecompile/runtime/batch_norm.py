"""BatchNorm whose running statistics are those of the whole batch (Kim et al. 2020, torchgpipe: deferred BatchNorm).

Each micro-batch is still normalised by its own mean and variance; what is deferred is the update of
the running ones, to the end of the step and to statistics over all its micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchStatistics:
    """Per channel the mean and the unbiased variance of ``count`` values."""

    count: int
    mean: torch.Tensor
    var: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[BatchStatistics]) -> BatchStatistics:
        """The statistics of all values, from those of disjoint parts (Chan, Golub and LeVeque 1983)."""
        count = sum(part.count for part in parts)
        mean = torch.stack([part.mean * (part.count / count) for part in parts]).sum(0)
        squares = torch.stack([part.var * (part.count - 1) + (part.mean - mean) ** 2 * part.count for part in parts])
        return cls(count, mean, squares.sum(0) / (count - 1))

    def update(self, mean: torch.Tensor, var: torch.Tensor, momentum: float) -> None:
        """Move running statistics towards these, as ``torch.nn.BatchNorm2d`` does."""
        mean.lerp_(self.mean, momentum)
        var.lerp_(self.var, momentum)


__all__ = ["BatchStatistics"]
