"""The one place that touches torch internals: operator schemas and module buffers.

``tests/passes/test_operators.py`` tells when one of them moves.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import io
import logging
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn

aten: Any = torch.ops.aten


def is_operator(target: Any) -> bool:
    """Whether a node's target is one overload of a registered operator."""
    return isinstance(target, torch._ops.OpOverload)


def is_higher_order(target: Any) -> bool:
    """Whether a node's target takes sub-graphs (cond, autocast regions)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def operator_name(node: fx.Node) -> str:
    """``aten::relu_`` for an operator call, else the empty string."""
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def overload_name(target: Any) -> str:
    """``Tensor`` of ``aten.add.Tensor``; ``default`` where there is only one."""
    return str(target._overloadname)


def qualified_name(target: Any) -> tuple[str, str, str]:
    """(namespace, operator, overload) of an operator overload."""
    namespace, name = target._schema.name.split("::")
    return namespace, name, overload_name(target)


def argument_names(target: Any) -> list[str]:
    """Names of an operator's arguments, in order."""
    return [argument.name for argument in target._schema.arguments]


def returns_alias(node: fx.Node) -> bool:
    """Whether the schema says that the result may share storage with an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(value.alias_info is not None for value in node.target._schema.returns)


#: Operators that update running statistics without saying so in their schema: where their
#: arguments tell that they do, and which arguments they write.
_STATISTICS = {"aten::batch_norm": (5, (3, 4)), "aten::instance_norm": (5, (3, 4))}


def written_args(node: fx.Node) -> list[fx.Node]:
    """The argument nodes a call writes to, by its operator's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    written: list[fx.Node] = []
    flag, statistics = _STATISTICS.get(operator_name(node), (0, ()))
    if statistics and node.args[flag] is True:
        written += [arg for i in statistics if isinstance(arg := node.args[i], fx.Node)]
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        fx.map_arg(value, written.append)
    return written


def out_of_place(node: fx.Node) -> Any | None:
    """``aten.add.Tensor`` for a call of ``aten.add_.Tensor``, with the same arguments; else None."""
    name = operator_name(node)
    if not name.startswith("aten::") or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name.removeprefix("aten::")[:-1], None)
    overload = overload_name(node.target)
    if packet is None or overload not in packet.overloads():
        return None
    twin = getattr(packet, overload)
    return twin if argument_names(twin) == argument_names(node.target) and len(written_args(node)) == 1 else None


def is_random(target: Any) -> bool:
    """Whether a call draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def draws(node: fx.Node) -> bool:
    """Whether this very call draws random numbers: not a dropout with probability 0."""
    if not is_random(node.target):
        return False
    name, args = operator_name(node), node.args
    if name in ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"):
        return bool(args[1] != 0) and args[2] is True
    if name == "aten::scaled_dot_product_attention":
        return bool(args[4] if len(args) > 4 else node.kwargs.get("dropout_p", 0.0))
    if name in ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"):
        # ..., has_biases, num_layers, dropout, train, ...: the first bool is has_biases
        flags = [i for i, arg in enumerate(args) if isinstance(arg, bool)]
        return bool(args[flags[0] + 2]) and args[flags[0] + 3] is True
    return True


#: Operators whose weight gradient is worth computing later than their input gradient, with the
#: positions of their weights.
_HEAVY = {
    "aten::linear": (1, 2),
    "aten::addmm": (0, 2),
    "aten::embedding": (0,),
    **{f"aten::conv{kind}": (1, 2) for kind in ("1d", "2d", "3d", "olution", "_transpose1d")},
    "aten::conv_transpose2d": (1, 2),
    "aten::conv_transpose3d": (1, 2),
    "aten::mm": (1,),
    "aten::matmul": (1,),
}


def heavy_weights(node: fx.Node) -> list[fx.Node]:
    """The weights of a call whose weight gradient can be put off: convolution, linear, embedding and the like."""
    positions = _HEAVY.get(operator_name(node), ())
    return [arg for i in positions if i < len(node.args) and isinstance(arg := node.args[i], fx.Node)]


@contextmanager
def not_exporting() -> Generator[None]:
    """Let code that asks ``torch.compiler.is_exporting()`` believe it runs eagerly.

    Libraries take other paths while exporting (transformers builds attention masks that it skips
    in eager); the other path computes the same up to rounding only.
    """
    flags = ("_is_exporting_flag", "_is_compiling_flag")
    before = {flag: getattr(torch.compiler, flag) for flag in flags}
    try:
        for flag in flags:
            setattr(torch.compiler, flag, False)
        yield
    finally:
        for flag, value in before.items():
            setattr(torch.compiler, flag, value)


@contextmanager
def quiet_export() -> Generator[None]:
    """Keep to itself what export prints about a failure: the error raised says it in fewer words."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own buffers: the dict itself, so that one can be put back under its name."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters: the dict itself."""
    return module._parameters
