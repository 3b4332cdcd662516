"""What a stage does with the gradients of an update before it makes it: the mean, a largest norm, or nothing at all."""

from __future__ import annotations

import torch
from torch.nn.utils import get_total_norm

from pipecompile.runtime.step import Sums


class Gradients:
    """The sums of one stage, on their way to its optimizer.

    Args:
        clip_norm: the largest norm of the stage's gradients together, as ``torch.nn.utils.clip_grad_norm_``.
        skip: an update whose gradients are not finite is left out. Else it is an error, if they are clipped.
    """

    def __init__(self, clip_norm: float | None, *, skip: bool) -> None:
        self._clip, self._skip = clip_norm, skip
        self._left_out = 0

    def ready(self, sums: Sums, samples: int, stage: int) -> bool:
        """Make the mean of ``samples``, clipped; False, and nothing left, where the update is to be left out.

        Raises:
            FloatingPointError: if it cannot be clipped and must not be left out.
        """
        if samples > 1:
            for name, total in sums.values.items():
                sums.values[name] = total / samples
        if self._clip is None and not self._skip:
            return True
        norm = get_total_norm([gradient.to_dense() for gradient in sums.values.values()])
        if not bool(torch.isfinite(norm)):
            if not self._skip:
                raise FloatingPointError(
                    f"the gradients of stage {stage} have the norm {float(norm)}: look at the sample, or compile with "
                    'on_nonfinite="skip"'
                )
            sums.values.clear()
            self._left_out += 1
            return False
        if self._clip is not None:
            scale = torch.clamp(self._clip / (norm + 1e-6), max=1.0)
            for name, gradient in sums.values.items():
                sums.values[name] = gradient * scale.to(gradient.dtype)
        return True

    def left_out(self) -> int:
        """How many updates were left out since this was last asked."""
        count, self._left_out = self._left_out, 0
        return count


__all__ = ["Gradients"]
