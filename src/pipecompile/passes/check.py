"""Compare a captured graph with the eager model: export loses some things without a word."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn

from pipecompile.errors import TraceError
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.passes.capture import module_of, source_of
from pipecompile.passes.observe import copies
from pipecompile.passes.operators import buffers_of


@contextmanager
def exact(model: nn.Module) -> Generator[None]:
    """Eager as the promise means it: no gradients, no fused fast path (it differs by 6e-7)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def run_once(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The flat result of the eager model on copies of the examples; buffers are put back.

    Raises:
        TraceError: if the model fails on its own example inputs.
    """
    with exact(model), buffers_kept(model):
        try:
            return flatten(model(*_fresh(tuple(args)), **_fresh(dict(kwargs))))[0]
        except Exception as error:  # user code may raise anything
            reason = str(error).strip() or type(error).__name__
            raise TraceError(
                f"{type(model).__name__} fails in plain PyTorch on the example inputs: {type(error).__name__}: {reason}"
            ) from error


def compare_with_eager(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: Mapping[str, torch.Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run model and graph on the examples twice in a row, each time under another seed.

    Results and buffers must be equal bit for bit (NaN equals NaN). The model's buffers are put
    back afterwards.

    Raises:
        TraceError: naming the first layer that differs and the model's source line.
    """
    problem = _compare(model, module, tensors, args, kwargs, None)
    if problem is None:
        return
    record: dict[str, list[torch.Tensor]] = {}
    values: dict[fx.Node, torch.Tensor] = {}
    with suppress(Exception):  # only to say where: the difference itself is already known
        _compare(model, module, tensors, args, kwargs, (record, values))
    raise _differs(problem, record, values, model)


def _compare(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: Mapping[str, torch.Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    evidence: tuple[dict[str, list[torch.Tensor]], dict[fx.Node, torch.Tensor]] | None,
) -> str | None:
    """What differs first, if anything. ``evidence`` receives the values of modules and nodes."""
    buffers = dict(model.named_buffers())
    state = copies(tensors.values())
    traced_buffers = {
        name: t for name, b in buffers.items() for own, t in zip(tensors.values(), state, strict=True) if own is b
    }
    with buffers_kept(model), exact(model):
        for seed in (0, 1):
            torch.manual_seed(seed)
            with _recording(model, evidence and evidence[0]):
                expected, _ = flatten(model(*_fresh(tuple(args)), **_fresh(dict(kwargs))))
            runner = _Recorder(module, evidence and evidence[1])
            torch.manual_seed(seed)
            leaves, _ = flatten((tuple(args), dict(kwargs)))
            result = runner.run(*state, *copies(leaves))
            again = " on the second call" if seed else ""
            for i, (eager, traced) in enumerate(zip(expected, result, strict=True)):
                if not same(eager, traced):
                    return f"result {i}{again}"
            for name, traced in traced_buffers.items():
                if not same(model.get_buffer(name), traced):
                    return f"buffer {name!r}{again}"
    return None


@contextmanager
def buffers_kept(model: nn.Module) -> Generator[None]:
    """Put a model's buffers back as they were: the objects and their values."""
    holders = [(m, key, b) for m in model.modules() for key, b in buffers_of(m).items()]
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for owner, key, buffer in holders:
            buffers_of(owner)[key] = buffer
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def same(one: Any, other: Any) -> bool:
    """Equal in dtype, shape and every bit that matters: NaN equals NaN, 0.0 equals -0.0."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one, other)) or bool(torch.equal(one.isnan(), other.isnan()) and _equal_rest(one, other))


def _equal_rest(one: torch.Tensor, other: torch.Tensor) -> bool:
    known = ~one.isnan()
    return bool(torch.equal(one[known], other[known]))


def _fresh(nest: Any) -> Any:
    leaves, tree = flatten(nest)
    return unflatten(tree, copies(leaves))


@contextmanager
def _recording(model: nn.Module, record: dict[str, list[torch.Tensor]] | None) -> Generator[None]:
    """Note each module's first result by path."""
    hooks: list[Any] = []
    if record is not None:
        record.clear()
        for name, module in model.named_modules():

            def hook(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                if name not in record:
                    record[name] = [leaf.clone() for leaf in flatten(output)[0]]

            hooks.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Recorder(fx.Interpreter):
    """An interpreter that may keep a copy of every tensor: later in-place writes must not change it."""

    def __init__(self, module: fx.GraphModule, values: dict[fx.Node, torch.Tensor] | None) -> None:
        super().__init__(module)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.values is not None and isinstance(result, torch.Tensor) and n.op == "call_function":
            self.values[n] = result.clone()
        return result


def _differs(
    what: str,
    record: Mapping[str, list[torch.Tensor]],
    values: Mapping[fx.Node, torch.Tensor],
    model: nn.Module,
) -> TraceError:
    """Name the first module whose recorded result no value of its nodes in the graph equals."""
    inside: dict[str, list[fx.Node]] = {}
    for node in values:
        for path in module_of(node):
            inside.setdefault(path, []).append(node)
    where = f"in the code of {type(model).__name__} itself, outside its submodules"
    for path, expected in record.items():  # hooks fire innermost first, in order of execution
        nodes = inside.get(path, [])
        if path and nodes and any(not any(same(e, values[node]) for node in nodes) for e in expected):
            where = f"first in layer {path!r} ({type(model.get_submodule(path)).__name__}, {source_of(nodes[-1])})"
            break
    return TraceError(
        f"the captured graph of {type(model).__name__} differs from eager: {what}, {where}.\n"
        "  reason: capture keeps only tensors; a Python counter, a random choice or state kept outside "
        "buffers is frozen or lost\n"
        "  try:    keep state in buffers (register_buffer) and write to them in forward"
    )
