"""Compare two results in structure, class and every bit; shares no code with the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def differences(actual: Any, expected: Any, path: str = "result") -> list[str]:
    """All places where two nests differ, as readable lines; empty if they are the same."""
    return list(_walk(actual, expected, path, set()))


def _walk(actual: Any, expected: Any, path: str, seen: set[int]) -> Iterator[str]:
    # a parameter that the model returns comes back as a plain tensor that owns its memory
    tensors = isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor)
    if type(actual) is not type(expected) and not tensors:
        yield f"{path}: {type(actual).__name__} instead of {type(expected).__name__}"
        return
    if isinstance(expected, torch.Tensor):
        yield from _tensors(actual, expected, path)
        return
    if isinstance(expected, Mapping):
        if list(actual) != list(expected):
            yield f"{path}: keys {list(actual)} instead of {list(expected)}"
            return
        for key in expected:
            yield from _walk(actual[key], expected[key], f"{path}[{key!r}]", seen)
        return
    if isinstance(expected, (tuple, list)):
        if len(actual) != len(expected):
            yield f"{path}: {len(actual)} items instead of {len(expected)}"
            return
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            yield from _walk(one, other, f"{path}[{i}]", seen)
        return
    if dataclasses.is_dataclass(expected) or (hasattr(expected, "__dict__") and not callable(expected)):
        if id(expected) in seen:
            return
        seen.add(id(expected))
        if list(vars(actual)) != list(vars(expected)):
            yield f"{path}: fields {list(vars(actual))} instead of {list(vars(expected))}"
            return
        for name, value in vars(expected).items():
            yield from _walk(vars(actual)[name], value, f"{path}.{name}", seen)
        return
    if actual != expected:
        yield f"{path}: {actual!r} instead of {expected!r}"


def _tensors(actual: torch.Tensor, expected: torch.Tensor, path: str) -> Iterator[str]:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        yield (f"{path}: {tuple(actual.shape)} {actual.dtype} instead of {tuple(expected.shape)} {expected.dtype}")
        return
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if not bool(same.all()):
        wrong = int((~same).sum())
        gap = (actual.double() - expected.double()).abs().nan_to_num(float("inf")) if not actual.is_complex() else None
        largest = f", largest gap {float(gap.max()):.3g}" if gap is not None else ""
        yield f"{path}: {wrong} of {same.numel()} elements differ{largest}"
