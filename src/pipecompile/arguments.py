"""Match a call against what the pipeline was compiled for, and take it apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pipecompile.errors import InputError
from pipecompile.ir.graph import evaluate
from pipecompile.ir.package import Package
from pipecompile.ir.tree import Tree, flatten

_DENSE = torch.strided


class Arguments:
    """Turns ``(args, kwargs)`` or one item of a stream into the flat tensors of a package.

    Raises :class:`InputError` where a call differs in structure, constants, count, shape, dtype
    or device from the example inputs.
    """

    def __init__(self, package: Package, dynamic: Iterable[tuple[int, int]] = ()) -> None:
        """``dynamic`` names dimensions (input, dimension) that may differ besides those of the symbols."""
        self._package, self._card = package, package.plan.cluster.card
        self._tree = package.in_tree
        args, kwargs = package.in_tree.children
        self._one_tensor = len(args.children) == 1 and args.children[0].kind == "leaf" and not kwargs.children
        sized = {(symbol.input, symbol.dim) for symbol in package.symbols.values()}
        sized |= {(i, dim) for symbol in package.symbols.values() for i, dim, _ in symbol.also}
        dynamic = {*dynamic, *sized}
        self._checks = [
            (spec.torch_dtype, torch.Size(spec.shape), tuple((i, dim) not in dynamic for dim in range(len(spec.shape))))
            for i, spec in enumerate(package.inputs)
        ]

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat tensors of a call."""
        return self.check(self._flat(args, kwargs))

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        if self._one_tensor and not kwargs and len(args) == 1 and isinstance(args[0], torch.Tensor):
            return [args[0]]
        given = self._normalise(tuple(args), kwargs)
        try:
            leaves, tree = flatten(given)
        except InputError as error:
            raise InputError(f"{_refused(given, self._package.parameters)}{error}") from None
        (got, more), (want, keywords) = tree.children, self._tree.children
        names = [*self._package.parameters[: len(want.children)], *keywords.keys]
        if len(names) == len(want.children) + len(keywords.children):
            for name, child, expected in zip(
                names, (*got.children, *more.children), (*want.children, *keywords.children), strict=True
            ):
                self._same_structure(child, expected, f"argument {name!r}")
        else:  # *args, whose parameters have no names
            self._same_structure(tree, self._tree, "the call")
        return leaves

    def flat_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """As :meth:`of_call`, compared in structure only."""
        return self._flat(args, kwargs)

    def check(self, leaves: list[Any]) -> list[Any]:
        """The flat tensors of a call, compared with what was compiled for."""
        new_sizes = False
        for i, (leaf, (dtype, shape, fixed)) in enumerate(zip(leaves, self._checks, strict=True)):
            elsewhere = not leaf.is_cpu and str(leaf.device) != self._card
            if leaf.dtype is not dtype or elsewhere or leaf.layout is not _DENSE or leaf.shape != shape:
                self._check(i, leaf, dtype, shape, fixed)
                new_sizes = True
        if new_sizes:
            self._check_sizes(leaves)
        return leaves

    def of_item(self, item: Any) -> list[Any]:
        """The flat tensors of one item of a stream: a tensor, a tuple of arguments, or a dict of keywords."""
        return self.check(self.flat(item))

    def flat(self, item: Any) -> list[Any]:
        """As :meth:`of_item`, compared in structure only: a batch that is yet to be split."""
        if self._one_tensor and isinstance(item, torch.Tensor):
            return [item]
        args = self._tree.children[0].children
        if len(args) == 1 and flatten(item)[1] == args[0]:
            return self._flat((item,), {})
        # Data loaders make lists of tuples; a model that takes one list means that list.
        if isinstance(item, tuple) or (isinstance(item, list) and not (len(args) == 1 and args[0].kind == "list")):
            return self._flat(tuple(item), {})
        if isinstance(item, Mapping):
            return self._flat((), item)
        return self._flat((item,), {})

    def sizes(self, leaves: Sequence[torch.Tensor]) -> dict[str, int]:
        """Values of the dynamic sizes in a call."""
        return {name: leaves[s.input].shape[s.dim] for name, s in self._package.symbols.items()}

    def _normalise(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments dealt as in the example."""
        want_args, want_kwargs = self._tree.children
        names = self._package.parameters
        given = dict(zip(names, args, strict=False)) if len(args) <= len(names) else {}
        positional = len(want_args.children)
        if len(args) == positional and set(kwargs) == set(want_kwargs.keys):
            return args, {key: kwargs[key] for key in want_kwargs.keys}
        twice = given.keys() & kwargs.keys()
        merged = {**given, **kwargs}
        wanted = [*names[:positional], *want_kwargs.keys]
        if not twice and len(given) == len(args) and set(merged) == set(wanted):
            return tuple(merged[n] for n in names[:positional]), {key: merged[key] for key in want_kwargs.keys}
        missing, unknown = [n for n in wanted if n not in merged], [n for n in merged if n not in wanted]
        faults = [
            *([f"{len(args)} positional arguments are given"] if len(args) > len(names) else []),
            *([f"{', '.join(sorted(twice))} is given twice"] if twice else []),
            *([f"{', '.join(missing)} is missing"] if missing and (given or not args) else []),
            *([f"{', '.join(unknown)} is not in the example inputs"] if unknown else []),
        ]
        raise InputError(
            f"{self._package.model} was compiled for {', '.join(wanted) or 'no arguments'}; in this call "
            f"{'; '.join(faults)}. Call it as in the example inputs, or compile it again for this form"
        )

    def _same_structure(self, got: Tree, want: Tree, where: str) -> None:
        if got.kind != want.kind or got.keys != want.keys or len(got.children) != len(want.children):
            raise InputError(
                f"{where} has another structure than the example inputs: {_describe(got)} instead of {_describe(want)}"
            )
        if want.kind == "const" and not _same_const(got.const, want.const):
            raise InputError(
                f"{where} is {got.const!r}, but the pipeline was compiled with {want.const!r}; values other than "
                "tensors are fixed when compiling: compile again for another value"
            )
        for i, (child, expected) in enumerate(zip(got.children, want.children, strict=True)):
            self._same_structure(child, expected, f"{where}[{want.keys[i] if want.keys else i!r}]")

    def _check(
        self, index: int, leaf: torch.Tensor, dtype: torch.dtype, shape: torch.Size, fixed: Sequence[bool]
    ) -> None:
        name = self._package.input_names[index]
        if leaf.device.type != "cpu" and str(leaf.device) != self._card:
            where, remedy = self._card or "cpu", f".to({self._card!r})" if self._card else ".cpu()"
            raise InputError(f"input {name!r} is on {leaf.device}; this pipeline runs on {where}: pass it as {remedy}")
        if leaf.layout is not torch.strided:
            raise InputError(f"input {name!r} has layout {leaf.layout}: pass it as .to_dense()")
        if leaf.dtype is not dtype:
            raise InputError(f"input {name!r} has dtype {leaf.dtype}, compiled for {dtype}: pass it as .to({dtype})")
        if leaf.dim() != len(shape) or any(
            keep and got != want for got, want, keep in zip(leaf.shape, shape, fixed, strict=True)
        ):
            want = "x".join(str(n) if keep else "*" for n, keep in zip(shape, fixed, strict=True))
            got = "x".join(map(str, leaf.shape))
            raise InputError(
                f"input {name!r} has shape {got or '()'}, compiled for {want or '()'}: pass that shape, or compile "
                "for this one (for streams also for sizes that change: dynamic_shapes=)"
            )
        for symbol in self._package.symbols.values():
            size = leaf.shape[symbol.dim] if symbol.input == index else symbol.low
            if not symbol.low <= size <= symbol.high:
                raise InputError(
                    f"input {name!r} has size {size} in dimension {symbol.dim}; the model was captured for "
                    f"{symbol.low} to {symbol.high}"
                )

    def _check_sizes(self, leaves: Sequence[torch.Tensor]) -> None:
        """Sizes that follow from others, in one input or between inputs."""
        sizes, names = self.sizes(leaves), self._package.input_names
        for symbol in self._package.symbols.values():
            for i, dim, expression in symbol.also:
                want = evaluate(expression, sizes)
                if leaves[i].shape[dim] != want:
                    raise InputError(
                        f"input {names[i]!r} has size {leaves[i].shape[dim]} in dimension {dim}; with "
                        f"{names[symbol.input]!r} of size {leaves[symbol.input].shape[symbol.dim]} in dimension "
                        f"{symbol.dim} it must be {want}"
                    )


def _refused(given: tuple[tuple[Any, ...], dict[str, Any]], names: Sequence[str]) -> str:
    """Which argument it is that cannot be taken apart."""
    args, kwargs = given
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        try:
            flatten(value)
        except InputError:
            return f"argument {name!r}: "
    return ""


def _same_const(one: Any, other: Any) -> bool:
    try:
        return (type(one) is type(other) and bool(one == other)) or (isinstance(other, str) and repr(one) == other)
    except Exception:  # a user's __eq__ may do anything; unequal is the safe answer
        return False


def _describe(tree: Tree) -> str:
    if tree.kind == "leaf":
        return "a tensor"
    if tree.kind == "const":
        return repr(tree.const)
    inside = ", ".join(str(k) for k in tree.keys) if tree.keys else f"{len(tree.children)} items"
    return f"{tree.cls.rpartition(':')[2] or tree.kind} of {inside}"
