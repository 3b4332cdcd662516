"""Compare the gradients of a captured graph with those of the eager model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from pipecompile.errors import TraceError
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.passes.check import exact
from pipecompile.passes.keep import state_kept
from pipecompile.passes.observe import copies

#: Relative difference of a gradient (in the 2-norm) that rounding explains, by dtype; graph and
#: eager may add in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def compare_gradients(
    model: nn.Module,
    module: fx.GraphModule,
    tensors: Mapping[str, torch.Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Differentiate a random weighting of all results on the examples, in the graph and in eager.

    Buffers, gradients and random state of the model stay as they are.

    Raises:
        TraceError: naming the last layer whose gradients differ: what capture lost (a hook on a
            tensor or a module, a custom backward) lies in it or right behind it.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with exact(model), torch.enable_grad():
        with state_kept(model):
            torch.manual_seed(0)
            fresh_args, fresh_kwargs = _fresh(tuple(args)), _fresh(dict(kwargs))
            expected = _differentiate(flatten(model(*fresh_args, **fresh_kwargs))[0], list(trained.values()))
        state = copies(tensors.values())
        mine = {id(tensors[name]): copy for name, copy in zip(tensors, state, strict=True)}
        torch.manual_seed(0)
        leaves, _ = flatten((tuple(args), dict(kwargs)))
        result: Any = fx.Interpreter(module).run(*state, *(_detached(leaf) for leaf in copies(leaves)))
        wanted = [mine[id(p)] for p in trained.values() if id(p) in mine]
        found = dict(zip([n for n, p in trained.items() if id(p) in mine], _differentiate(result, wanted), strict=True))
    differing = [
        name for name, gradient in zip(trained, expected, strict=True) if not _close(gradient, found.get(name))
    ]
    if differing:
        last = max(differing, key=lambda name: _position(module, tensors, trained[name]))
        owner = last.rpartition(".")[0]
        layer = f"layer {owner!r} ({type(model.get_submodule(owner)).__name__})" if owner else "the model itself"
        raise TraceError(
            f"the gradients of the captured graph of {type(model).__name__} differ from eager for {len(differing)} of "
            f"{len(trained)} parameters, the last of them {last!r} in {layer}.\n"
            "  reason: capture keeps what forward computes; a hook on a tensor or module, or the backward of a custom "
            f"autograd.Function, in or right behind {layer} is lost\n"
            "  try:    express it in forward (for x.register_hook(f): a term of the loss, or detach), or leave that "
            "part out of the pipeline"
        )


def _differentiate(results: Sequence[Any], wanted: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    total: Any = 0.0
    generator = torch.Generator().manual_seed(7)
    for result in results:
        if isinstance(result, torch.Tensor) and result.requires_grad:
            weights = torch.rand(result.shape, generator=generator, dtype=torch.float64) + 0.5
            total = total + (result * weights.to(result)).sum()
    if not isinstance(total, torch.Tensor):
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, list(wanted), allow_unused=True))


def _close(eager: torch.Tensor | None, traced: torch.Tensor | None) -> bool:
    if eager is None or traced is None:
        given = traced if eager is None else eager
        return given is None or not bool(given.to_dense().any())
    eager, traced = eager.to_dense(), traced.to_dense()
    rounded = torch.bfloat16 if torch.is_autocast_enabled(eager.device.type) else eager.dtype
    tolerance = max(_TOLERANCE.get(rounded, 1e-3), _TOLERANCE.get(eager.dtype, 1e-3))
    if not bool(torch.isfinite(eager).all()):
        return bool(torch.equal(torch.isfinite(eager), torch.isfinite(traced)))
    norm = float(eager.double().norm()) if not eager.is_complex() else float(eager.abs().double().norm())
    return float((eager - traced).abs().double().norm()) <= tolerance * norm + 1e-12


def _position(module: fx.GraphModule, tensors: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> int:
    """Where in the graph a parameter is first used; -1 where it is not."""
    names = {name for name, tensor in tensors.items() if tensor is parameter}
    for i, node in enumerate(module.graph.nodes):
        if any(arg.name in names for arg in node.all_input_nodes):
            return i
    return -1


def _fresh(nest: Any) -> Any:
    leaves, tree = flatten(nest)
    return unflatten(tree, [_detached(leaf) for leaf in copies(leaves)])


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


__all__ = ["compare_gradients"]
