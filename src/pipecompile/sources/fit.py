"""Make pictures and arrays into what a compiled model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipecompile.errors import InputError
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import Package
from pipecompile.ir.tree import unflatten


def package_of(like: Any) -> Package:
    """The package of a pipeline, of a decorated model that was compiled, or the package itself.

    Raises:
        InputError: if ``like`` is none of these.
    """
    if isinstance(like, Package):
        return like
    for holder in (like, getattr(like, "pipeline", None)):
        found = getattr(holder, "package", None)
        if isinstance(found, Package):
            return found
    raise InputError(f"like={type(like).__name__} is no compiled pipeline: compile the model first, or pass transform=")


def item_of(leaves: Sequence[torch.Tensor], package: Package) -> Any:
    """A call's flat tensors as an item of a stream: a tuple, or a dict where a keyword is among them."""
    args, kwargs = unflatten(package.in_tree, list(leaves))
    return {**dict(zip(package.parameters, args, strict=False)), **kwargs} if kwargs else args


@dataclass(frozen=True)
class Fit:
    """Fits one tensor to the single input of a package. ``what`` names the source in errors."""

    package: Package
    what: str

    @property
    def spec(self) -> TensorSpec:
        """The only input.

        Raises:
            InputError: if the model has several.
        """
        if len(self.package.inputs) != 1:
            names = ", ".join(self.package.input_names)
            raise InputError(
                f"{self.what} can feed one input, but the model has {len(self.package.inputs)}: {names}. "
                "Pass transform= to make all of them from each item"
            )
        return self.package.inputs[0]

    def entry(self, array: np.ndarray[Any, Any]) -> Any:
        """An array that holds the values of one input, given its shape and dtype."""
        spec = self.spec
        return item_of([torch.from_numpy(np.array(array)).to(spec.torch_dtype).reshape(spec.shape)], self.package)


@dataclass(frozen=True)
class Picture:
    """How a picture becomes an input: channels, size, order of dimensions.

    ``size`` is (height, width), None where the picture keeps its own. ``scale``: 0 to 255 becomes
    0 to 1. ``first``: channels come before rows and columns. ``batch``: a dimension of 1 in front.
    """

    fit: Fit | None
    channels: int = 3
    size: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    first: bool = True
    batch: bool = True

    @classmethod
    def like(cls, package: Package, what: str) -> Picture:
        """What fits the single input of ``package``.

        Raises:
            InputError: if that input cannot be a picture.
        """
        fit = Fit(package, what)
        spec = fit.spec
        shape, batch = spec.shape, False
        if len(shape) == 4 and shape[0] == 1:
            shape, batch = shape[1:], True
        if len(shape) != 3 or not {shape[0], shape[2]} & {1, 3}:
            raise InputError(
                f"{what}: pictures fit an input of shape 1x3xHxW, 3xHxW or 1xHxWx3 (or 1 channel in place of 3), "
                f"but the model was compiled for {'x'.join(map(str, spec.shape)) or 'a scalar'}"
            )
        first = shape[0] in (1, 3)
        channels, height, width = shape if first else (shape[2], shape[0], shape[1])
        free = {symbol.dim for symbol in package.symbols.values()} & {batch + first, batch + first + 1}
        return cls(fit, channels, None if free else (height, width), spec.torch_dtype, first, batch)

    @property
    def format(self) -> str:
        """The pixel format as FFmpeg names it."""
        return "rgb24" if self.channels == 3 else "gray"

    def item(self, pixels: np.ndarray[Any, Any]) -> Any:
        """``pixels`` (rows x columns x channels, or rows x columns, bytes) as an item of a stream."""
        tensor = torch.from_numpy(pixels).reshape(*pixels.shape[:2], self.channels)
        if self.first:
            tensor = tensor.permute(2, 0, 1)
        tensor = tensor.to(self.dtype)
        if self.dtype.is_floating_point:
            tensor = tensor / 255
        tensor = (tensor[None] if self.batch else tensor).contiguous()
        return tensor if self.fit is None else item_of([tensor], self.fit.package)
