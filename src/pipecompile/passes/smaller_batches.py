"""Down to how many samples a captured graph is right.

Export says what it took for granted of sizes, and is asked for each of them. It takes a size of 1 for a constant, so
a graph of more samples says nothing of 1: there it is compared with eager instead. No size is left open in it then,
so what is seen once holds for every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipecompile.errors import PipecompileError, TraceError
from pipecompile.ir.graph import Symbol
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.passes.capture import Capture
from pipecompile.passes.check import compare_with_eager, run_once
from pipecompile.passes.check_step import compare_gradients


@dataclass(frozen=True)
class SmallerBatches:
    """Find the fewest samples a micro-batch may have. ``least`` must be possible.

    ``batched`` says which inputs have them as dimension 0.
    """

    batched: tuple[bool, ...]
    least: int

    def apply(
        self, model: nn.Module, found: Capture, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Symbol]:
        """The sizes of ``found`` with that number as their lower bound; ``args`` and ``kwargs`` are the example.

        Raises:
            TraceError: if it is above ``least``, or the graph differs from the model at two samples.
        """
        leaves, _ = flatten((tuple(args), dict(kwargs)))
        most = low = next(leaf.shape[0] for leaf, cut in zip(leaves, self.batched, strict=True) if cut)
        reason = self._fixed(found)
        while low > 2 and not reason:
            row = self._first(leaves, low - 1)
            reason = found.refuses([torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for leaf in row])
            low -= not reason
        if low == 2 and not reason:
            if most > 2:
                self._compare(model, found, args, kwargs, 2)
            try:
                self._compare(model, found, args, kwargs, 1)
                low = 1
            except PipecompileError as error:
                reason = str(error)
        if low > self.least:
            sizes = f"{low} to {most}" if low < most else str(most)
            raise TraceError(
                f"{type(model).__name__} can be captured for micro-batches of {sizes} samples only, and {self.least} must "
                f"be possible where batches differ in size.\n  reason: {reason}\n"
                "  try:    leave the size open in forward (x.shape[0], or -1 in a view); or fix it: no dynamic_batch=True, "
                "and an example batch that micro_batches divides"
            )
        cut = {name for name, s in found.symbols.items() if s.dim == 0 and self.batched[s.input]}
        return {name: replace(s, low=low) if name in cut else s for name, s in found.symbols.items()}

    def _fixed(self, found: Capture) -> str:
        """Why no other size than that of the example is possible at all."""
        symbols = found.symbols.values()
        free = {(s.input, s.dim) for s in symbols} | {place[:2] for s in symbols for place in s.also}
        fixed = [found.inputs[i] for i, cut in enumerate(self.batched) if cut and (i, 0) not in free]
        return f"forward makes a constant of the size of {fixed[0]!r} in dimension 0" if fixed else ""

    def _first(self, leaves: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
        return [leaf[:size] if cut else leaf for leaf, cut in zip(leaves, self.batched, strict=True)]

    def _compare(
        self, model: nn.Module, found: Capture, args: Sequence[Any], kwargs: Mapping[str, Any], size: int
    ) -> None:
        leaves, tree = flatten((tuple(args), dict(kwargs)))
        args, kwargs = unflatten(tree, self._first(leaves, size))
        run_once(model, args, kwargs, str(leaves[0].device))
        compare_with_eager(model, found.module, found.tensors, found.out_tree, args, kwargs)
        compare_gradients(model, found.module, found.tensors, args, kwargs)


__all__ = ["SmallerBatches"]
