"""What a model to compile is called on the command line, and what its inputs look like."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipecompileError
from pipecompile.sources.arrays import random_tensor

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
        value = random_tensor(entry.shape, entry.dtype, generator)
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
        kind = type(found).__name__
        raise InputError(f"{text} is of type {kind}; expected a model, its class, or a function returning it")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InputError(
            f"{text} cannot be called without arguments ({error}): name a function that needs none"
        ) from None
    except ValueError:  # no signature to look at: calling it will tell
        pass
    try:
        model = found()
    except PipecompileError:
        raise
    except Exception as error:  # a user's factory may raise anything; a traceback of ours around it helps nobody
        raise InputError(f"{text}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{text} returned something of type {type(model).__name__}; expected a torch.nn.Module")
    return model


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
