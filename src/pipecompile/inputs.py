"""What the command line can feed a pipeline with: factories, shapes, files, videos, random numbers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from pipecompile.errors import InputError
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import Package
from pipecompile.ir.tree import flatten, unflatten

_SYNTAX = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Wanted:
    """One input of a model: by position if ``name`` is empty."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def parse(text: str) -> Wanted:
    """Read ``[name=]shape[:dtype]``, such as ``1x3x224x224`` or ``ids=1x16:int64``.

    Raises:
        InputError: if the text does not follow that form.
    """
    found = _SYNTAX.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"--input {text!r} is not understood: write sizes with x between them, such as 1x3x224x224, "
            "1x16:int64 or mask=1x16:bool"
        )
    dtype = getattr(torch, found["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        known = sorted(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
        raise InputError(f"--input {text!r}: there is no dtype {found['dtype']!r}{_nearest(found['dtype'], known)}")
    shape = () if found["shape"] == "scalar" else tuple(int(size) for size in found["shape"].split("x"))
    return Wanted(found["name"] or "", shape, dtype)


def draw(wanted: Sequence[Wanted]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Example arguments: normal random floats, ones for integers and booleans (valid as indices and masks)."""
    generator = torch.Generator().manual_seed(0)
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for entry in wanted:
        value = _random(entry.shape, entry.dtype, generator)
        if entry.name:
            kwargs[entry.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def load_factory(text: str) -> nn.Module:
    """The model that ``module:name`` means: a Module class, a function returning a Module, or a Module.

    Raises:
        InputError: if it cannot be found, called, or is no model.
    """
    module_name, colon, path = text.rpartition(":")
    if not colon or not module_name or not path:
        raise InputError(f"{text!r} is not understood: write MODULE:NAME, such as mynet:Net or nets/tiny.py:make")
    found: Any = _import(module_name)
    where = module_name
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{where} has no attribute {part!r}{_nearest(part, dir(found))}")
        found, where = getattr(found, part), f"{where}.{part}"
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{text} is a {type(found).__name__}; expected a model, its class, or a function returning it")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InputError(
            f"{text} cannot be called without arguments ({error}): name a function that needs none"
        ) from None
    except ValueError:  # no signature to look at: calling it will tell
        pass
    model = found()
    if not isinstance(model, nn.Module):
        raise InputError(f"{text} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def open_source(source: str, package: Package) -> Iterator[Any]:
    """Items for ``stream()``, from ``random:N``, a ``.npy`` file or a video.

    Raises:
        InputError: if the source does not exist or does not fit the compiled inputs.
    """
    kind, _, count = source.partition(":")
    if kind == "random":
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"--input {source!r} is not understood: write random:100 for a hundred samples")
        return _random_samples(int(count), package)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--input {source}: there is no such file")
    return _array_samples(path, package) if path.suffix == ".npy" else _video_samples(path, package)


def first_tensor(result: Any) -> torch.Tensor:
    """The first tensor of a result.

    Raises:
        InputError: if there is none to write.
    """
    leaves, _ = flatten(result)
    if not leaves:
        raise InputError("the model returns no tensor, so there is nothing to write")
    return leaves[0]


def write(path: Path, results: list[torch.Tensor]) -> Path:
    """Write results of equal shape as one array, the samples along a new first axis.

    Raises:
        InputError: if the results cannot be one array, or the file cannot be written.
    """
    if len({tuple(result.shape) for result in results}) > 1:
        raise InputError("the results differ in shape from sample to sample: they cannot be one .npy file")
    stacked = torch.stack(results)
    if stacked.dtype is torch.bfloat16:
        stacked = stacked.float()  # numpy has no bfloat16; every value of it is a float32
    try:
        np.save(path, stacked.resolve_conj().resolve_neg().numpy())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    return path


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(f"there is no module {missing!r} here or among the installed packages") from None
        raise InputError(f"{name} needs the module {missing!r}, which is not installed") from None


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [k for k in known if not k.startswith("__")], 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.ones(shape, dtype=dtype)


def _random_samples(count: int, package: Package) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        leaves = [_random(spec.shape, spec.torch_dtype, generator) for spec in package.inputs]
        yield _arguments(leaves, package)


def _arguments(leaves: list[torch.Tensor], package: Package) -> Any:
    """A call's flat tensors as an item of a stream: a tuple, or a dict where a keyword is among them."""
    args, kwargs = unflatten(package.in_tree, leaves)
    return {**dict(zip(package.parameters, args, strict=False)), **kwargs} if kwargs else args


def _single(package: Package, source: Path) -> TensorSpec:
    if len(package.inputs) != 1:
        names = ", ".join(package.input_names)
        raise InputError(f"{source} can feed one input, but the model has {len(package.inputs)}: {names}")
    return package.inputs[0]


def _array_samples(path: Path, package: Package) -> Iterator[Any]:
    spec = _single(package, path)
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as an array: {error}") from None
    size = int(np.prod(spec.shape))
    if array.ndim == 0 or array.size != len(array) * size:
        raise InputError(
            f"{path} has shape {tuple(array.shape)}: each entry along its first axis must hold the {size} values of "
            f"one input of shape {spec.shape}"
        )

    def samples() -> Iterator[Any]:
        for entry in array:
            yield _arguments([torch.from_numpy(np.array(entry)).to(spec.torch_dtype).reshape(spec.shape)], package)

    return samples()


def _video_samples(path: Path, package: Package) -> Iterator[Any]:
    spec = _single(package, path)
    if len(spec.shape) != 4 or spec.shape[:2] != (1, 3):
        raise InputError(f"{path}: a video can feed an input of shape 1x3xHxW, the model was compiled for {spec.shape}")
    try:
        import av
    except ImportError:
        raise InputError(f"reading {path} needs PyAV: pip install 'pipecompile[video]'") from None
    height, width = spec.shape[2:]

    def samples() -> Iterator[Any]:
        try:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    pixels = frame.reformat(width, height, format="rgb24").to_ndarray()
                    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(spec.torch_dtype) / 255
                    yield _arguments([image.contiguous()], package)
        except (av.FFmpegError, IndexError) as error:
            raise InputError(f"{path} cannot be read as a video: {error}") from None

    return samples()
