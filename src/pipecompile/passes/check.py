"""Compare a captured graph with the eager model: export loses some things without a word."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn

from pipecompile.errors import ExampleError, InputError, TraceError
from pipecompile.ir.tree import Tree, flatten, unflatten
from pipecompile.passes.capture import module_of, source_of
from pipecompile.passes.keep import cards, state_kept
from pipecompile.passes.observe import copies


@contextmanager
def exact(model: nn.Module) -> Generator[None]:
    """Eager as the promise means it: no gradients, no fused fast path (it differs by 6e-7)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cards()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def run_once(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: str = "cpu") -> list[Any]:
    """The flat result of the eager model on copies of the examples; buffers are put back.

    Raises:
        InputError: if an example, TraceError: if a weight is no dense tensor on ``device``.
        ExampleError: if the model fails on its own example inputs.
    """
    _require_dense(model, flatten((tuple(args), dict(kwargs)))[0], device)
    with exact(model), state_kept(model):
        inputs, keywords = _fresh(tuple(args)), _fresh(dict(kwargs))
        try:
            result = model(*inputs, **keywords)
        except Exception as error:  # user code may raise anything
            reason = str(error).strip() or type(error).__name__
            raise ExampleError(
                f"{type(model).__name__} fails in plain PyTorch on the example inputs: {type(error).__name__}: {reason}"
            ) from error
        try:
            return flatten(result)[0]
        except InputError as error:
            raise TraceError(f"the result of {type(model).__name__} cannot be pipelined: {error}") from error


def _require_dense(model: nn.Module, leaves: Sequence[torch.Tensor], device: str) -> None:
    cpu = device == "cpu"
    wanted = "dense CPU tensors" if cpu else f"dense tensors on {device}, as the devices are"
    for leaf in leaves:
        if str(leaf.device) != device or leaf.layout is not torch.strided:
            raise InputError(f"example inputs must be {wanted}, got one on {leaf.device} with layout {leaf.layout}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if str(tensor.device) != device or tensor.layout is not torch.strided:
            remedy = (
                f"it has no values yet: give it memory with .to_empty(device={device!r}) and load its state_dict"
                if tensor.is_meta
                else f"convert it with {'.cpu()' if cpu else f'.to({device!r})'} or .to_dense()"
            )
            raise TraceError(
                f"{name!r} of {type(model).__name__} is on {tensor.device} with layout {tensor.layout}; parameters and "
                f"buffers must be {wanted}: {remedy}"
            )


def compare_with_eager(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: Mapping[str, torch.Tensor],
    out_tree: Tree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run model and graph on the examples twice in a row, each time under another seed.

    The first time floating-point inputs are reversed: a model that keeps a tensor of the last
    call outside its buffers then differs. Results and buffers must be equal bit for bit (NaN
    equals NaN). The model's state is put back afterwards.

    Raises:
        TraceError: naming the first layer that differs and the model's source line.
    """
    problem = _compare(model, module, tensors, out_tree, args, kwargs, None)
    if problem is None:
        return
    record: dict[str, list[torch.Tensor]] = {}
    values: dict[fx.Node, torch.Tensor] = {}
    with suppress(Exception):  # only to say where: the difference itself is already known
        _compare(model, module, tensors, out_tree, args, kwargs, (record, values))
    raise _differs(problem, record, values, model)


def _compare(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: Mapping[str, torch.Tensor],
    out_tree: Tree,
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
    given, in_tree = flatten((tuple(args), dict(kwargs)))
    with state_kept(model), exact(model):
        for seed, leaves in ((0, _reversed(given)), (1, given)):
            with _recording(model, evidence and evidence[0]):
                try:
                    expected = _eager(model, in_tree, leaves, seed)
                except Exception:  # its own checks may refuse reversed inputs; those given it took before
                    leaves = given  # noqa: PLW2901
                    expected = _eager(model, in_tree, given, seed)
            runner = _Recorder(module, evidence and evidence[1])
            torch.manual_seed(seed)
            result, _ = flatten(unflatten(out_tree, list(runner.run(*state, *copies(leaves)))), _is_number)
            again = " on the second call" if seed else ""
            if len(expected) != len(result):
                return f"{len(result)} results instead of {len(expected)}{again}"
            for i, (eager, traced) in enumerate(zip(expected, result, strict=True)):
                if not same(eager, traced):
                    return f"result {i}{again}"
            for name, traced in traced_buffers.items():
                if not same(model.get_buffer(name), traced):
                    return f"buffer {name!r}{again}"
    return None


def _eager(model: nn.Module, in_tree: Tree, leaves: list[Any], seed: int) -> list[Any]:
    torch.manual_seed(seed)
    args, kwargs = unflatten(in_tree, copies(leaves))
    return flatten(model(*args, **kwargs), _is_number)[0]


def _is_number(item: Any) -> bool:
    """Numbers are compared too: one may be computed in the graph, another is a constant there."""
    return isinstance(item, (bool, int, float))


def _reversed(leaves: list[Any]) -> list[Any]:
    """Other inputs with the same values in another order; integers and masks stay, they may mean places."""
    kept = copies(leaves)
    with torch.no_grad():
        for leaf, given in zip(kept, leaves, strict=True):
            if leaf.is_floating_point() or leaf.is_complex():
                with suppress(RuntimeError):  # memory that overlaps itself cannot be written in another order
                    leaf.copy_(given.flip(tuple(range(given.dim()))))
    return kept


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
