"""A training checkpoint: one safetensors file, replaced whole or not at all.

Tensors are ``model/<name>`` and ``optimizer/<parameter>/<key>``; everything else is JSON in the
file's metadata. Nothing in it is code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipecompile.errors import ArtefactError, InputError

FORMAT = 1
_KEY = "pipecompile.pipelines.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from. ``optimizer`` is a state dict of one plain torch optimizer, or None.

    ``steps`` is the number of steps done, ``extra`` JSON data of the caller's.
    """

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any] | None
    steps: int
    extra: Any = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write beside ``path``, flush to the disk, rename: a crash at any time leaves the old file whole.

        Raises:
            InputError: if a setting of the optimizer or ``extra`` is not JSON.
        """
        target = Path(path)
        tensors: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        seen: dict[Any, str] = {}
        for name, tensor in self.model.items():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.nbytes and key in seen:
                aliases[name] = seen[key]
                continue
            seen[key] = name
            tensors[f"model/{name}"] = tensor
        optimizer = None if self.optimizer is None else _packed(self.optimizer, tensors)
        head = {
            "format": FORMAT,
            "steps": self.steps,
            "aliases": aliases,
            "optimizer": optimizer,
            "extra": _plain(self.extra, "extra"),
        }
        own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        # Always the same place, so that crashes leave one such folder at most, and the next save empties it.
        beside = target.with_name(f".{target.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            save_file(own, beside / target.name, metadata={_KEY: json.dumps(head)})
            _flush(beside / target.name)
            os.replace(beside / target.name, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        _flush(target.absolute().parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: if the file is none of ours, damaged, or of a later version.
        """
        try:
            with safe_open(path, "pt") as file:
                head = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except FileNotFoundError:
            raise ArtefactError(f"{path}: there is no such checkpoint") from None
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: not a whole checkpoint: {error}") from error
        if head is None:
            raise ArtefactError(f"{path}: a safetensors file, but no checkpoint of pipecompile")
        if head["format"] > FORMAT:
            raise ArtefactError(f"{path}: checkpoint format {head['format']}; this version reads up to {FORMAT}")
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        model |= {name: model[same] for name, same in head["aliases"].items()}
        optimizer = None if head["optimizer"] is None else _unpacked(head["optimizer"], tensors)
        return cls(model, optimizer, head["steps"], _value(head["extra"], tensors))

    def fits(self, state: Mapping[str, torch.Tensor], path: object) -> None:
        """Compare names and shapes with those of a model, before anything is changed.

        Raises:
            InputError: naming what differs.
        """
        missing, more = sorted(state.keys() - self.model.keys()), sorted(self.model.keys() - state.keys())
        if missing or more:
            differ = [
                f"{what} {', '.join(names[:5])}" for what, names in (("lacks", missing), ("also has", more)) if names
            ]
            raise InputError(f"{path} is of another model: it {' and '.join(differ)}")
        for name, tensor in state.items():
            found = self.model[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise InputError(
                    f"{path} is of another model: {name!r} is {found.dtype} of shape {tuple(found.shape)} there, "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} here"
                )


def _packed(state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The JSON part of an optimizer's state; tensors go to ``tensors``."""

    def entry(place: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[place] = value
            return {"tensor": place}
        return _plain(value, place)

    return {
        "state": {
            str(i): {key: entry(f"optimizer/{i}/{key}", value) for key, value in values.items()}
            for i, values in state["state"].items()
        },
        "param_groups": [
            {key: entry(f"optimizer/group {i}/{key}", value) for key, value in group.items()}
            for i, group in enumerate(state["param_groups"])
        ],
    }


def _unpacked(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    state = {int(i): {key: _value(v, tensors) for key, v in values.items()} for i, values in data["state"].items()}
    groups = [{key: _value(v, tensors) for key, v in group.items()} for group in data["param_groups"]]
    return {"state": state, "param_groups": groups}


def _value(found: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_plain`, with tensors put back."""
    if isinstance(found, dict) and found.keys() == {"tensor"} and found["tensor"] in tensors:
        return tensors[found["tensor"]]
    if isinstance(found, dict) and found.keys() == {"tuple"}:
        return tuple(_value(item, tensors) for item in found["tuple"])
    if isinstance(found, dict):
        return {key: _value(item, tensors) for key, item in found.items()}
    return [_value(item, tensors) for item in found] if isinstance(found, list) else found


def _plain(value: Any, where: str) -> Any:
    """As JSON data; a tuple is marked as one."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, where) for item in value]}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    raise InputError(f"{where} holds a {type(value).__name__}, which a checkpoint cannot: numbers, texts, lists, dicts")


def _flush(path: Path) -> None:
    """Wait until what was written is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


__all__ = ["Checkpoint"]
