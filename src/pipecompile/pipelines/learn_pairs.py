"""Pairs of an input and a target, checked against what was compiled and taken apart."""

from __future__ import annotations

from typing import Any

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError
from pipecompile.ir.learning import LearnPackage, TargetSpec
from pipecompile.ir.tree import flatten


class Pairs:
    """Checks what a source gives."""

    def __init__(self, learn: LearnPackage) -> None:
        self._arguments = Arguments(learn.package)

    def flat(self, item: Any, sample: int) -> tuple[list[Any], Any]:
        """The model's flat inputs, and the target as it came.

        Raises:
            InputError: naming the sample, if it is no pair or its input does not fit.
        """
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"sample {sample} is no pair (input, target); the target may be None")
        try:
            leaves = self._arguments.of_item(item[0])
        except InputError as error:
            raise InputError(f"sample {sample}: {error}") from error
        return [leaf.detach() for leaf in leaves], item[1]

    def flat_target(self, target: Any, sample: int, spec: TargetSpec) -> list[Any]:
        """The tensors of a target.

        Raises:
            InputError: naming the sample, if it is not like the first.
        """
        leaves, tree = flatten(target)
        if tree != spec.tree:
            raise InputError(
                f"sample {sample}: its target has another structure than that of the first: {type(target).__name__}"
            )
        for leaf, wanted in zip(leaves, spec.leaves, strict=True):
            if tuple(leaf.shape) != wanted.shape or leaf.dtype is not wanted.torch_dtype:
                raise InputError(
                    f"sample {sample}: its target is a {leaf.dtype} tensor of shape {tuple(leaf.shape)}; the first was "
                    f"{wanted.torch_dtype} of shape {wanted.shape}, and all must be alike"
                )
        return [leaf.detach() for leaf in leaves]


__all__ = ["Pairs"]
