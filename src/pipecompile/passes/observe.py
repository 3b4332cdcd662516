"""Run a captured graph once on real tensors and note what static analysis cannot know.

Strides as kernels really return them, which results share storage with which arguments, and
which storages are written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from pipecompile.errors import TraceError
from pipecompile.ir.graph import TensorSpec
from pipecompile.passes.capture import source_of
from pipecompile.passes.operators import written_args


@dataclass(frozen=True)
class Observation:
    """What one run showed.

    ``root[n]`` is the node whose storage ``n`` lies in (itself if new); ``writes[n]`` the roots
    that node ``n`` writes to; ``specs`` the layout of every tensor or number result.
    """

    specs: dict[str, TensorSpec]
    root: dict[fx.Node, fx.Node]
    writes: dict[fx.Node, tuple[fx.Node, ...]]


def observe(module: fx.GraphModule, tensors: Mapping[str, torch.Tensor], inputs: Sequence[Any]) -> Observation:
    """Run ``module`` on copies of its state and inputs, under ``no_grad``.

    ``tensors`` are the state by placeholder name, ``inputs`` the flat user inputs.
    """
    for node in module.graph.nodes:  # running half of one would leave torch inside it
        if getattr(node.target, "__module__", "").startswith("torch._functorch"):
            raise TraceError(
                "the captured graph holds a transform of torch.func (vmap, grad), which cannot be cut into stages.\n"
                f"  where:  {source_of(node) or 'unknown place'}\n"
                "  try:    write this part with batched operations"
            )
    watcher = _Watcher(module)
    watcher.run(*copies(tensors.values()), *copies(inputs))
    writes = {node: tuple(watcher.root[arg] for arg in written_args(node)) for node in module.graph.nodes}
    return Observation(watcher.specs, watcher.root, {node: roots for node, roots in writes.items() if roots})


def copies(values: Any) -> list[Any]:
    """Copies of tensors that keep strides, sharing and requires_grad; other values as they are."""
    storages: dict[int, torch.UntypedStorage] = {}
    result: list[Any] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            result.append(value)
            continue
        storage = value.untyped_storage()
        key = storage.data_ptr() or id(value)
        copy = storages.setdefault(key, storage.clone())
        fresh = torch.empty(0, dtype=value.dtype, device=value.device)
        fresh = fresh.set_(copy, value.storage_offset(), value.shape, value.stride())
        result.append(fresh.requires_grad_(value.requires_grad))
    return result


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # its own errors say where
        self.specs: dict[str, TensorSpec] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self.held: dict[int, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            with torch.no_grad():
                result = super().run_node(n)
            self._note(n, result)
        except Exception as error:  # an operator may raise anything
            reason = next(iter(str(error).strip().splitlines()), "")
            raise TraceError(
                f"the captured operation {n.target} cannot be run by itself.\n"
                f"  reason: {type(error).__name__}: {reason}\n"
                f"  where:  {source_of(n) or 'unknown place'}\n"
                "  try:    replace the operation, or keep it outside the model"
            ) from error
        return result

    def _note(self, n: fx.Node, result: Any) -> None:
        """Where a result lies and how it is laid out."""
        self.root[n] = n
        if n.op == "placeholder" and _storages(result):
            (pointer,) = _storages(result)
            self.root[n] = self.held.setdefault(pointer, n)
        if n.op == "call_function":
            mine = _storages(result)
            for arg in n.all_input_nodes:
                if mine & _storages(self.env[arg]):
                    self.root[n] = self.root[arg]
                    break
        if isinstance(result, (torch.Tensor, bool, int, float)):
            self.specs[n.name] = _dynamic(TensorSpec.of(result), n.meta.get("val"))


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        pointer = value.untyped_storage().data_ptr() if value.layout is torch.strided else 0
        return {pointer} if pointer else set()
    if isinstance(value, (tuple, list)):
        return set[int]().union(*(_storages(item) for item in value))
    return set()


def _dynamic(spec: TensorSpec, fake: Any) -> TensorSpec:
    """Mark a spec whose traced shape has symbols, with the bytes it needs as an expression."""
    if spec.kind != "tensor" or not isinstance(fake, torch.Tensor):
        return spec
    sizes: list[Any] = [*fake.shape, *fake.stride()]
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        return spec
    extent = " + ".join(f"(({n}) - 1) * ({step})" for n, step in zip(fake.shape, fake.stride(), strict=True))
    return replace(spec, dynamic=True, limit=f"64 + {fake.element_size()} * (1 + {extent})")
