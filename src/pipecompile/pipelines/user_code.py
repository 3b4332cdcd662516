"""The loss and the optimizer that users give, checked before a model is traced and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle
import torch

from pipecompile.errors import InputError
from pipecompile.runtime.update import OptimizerFactory, copies_kept
from pipecompile.streams.engine import ExecutorName

_OPTIMIZER = "give what makes one for a list of weights, such as functools.partial(torch.optim.SGD, lr=0.1)"


def check_code(
    loss_fn: Callable[[Any, Any], Any] | None, optimizer: OptimizerFactory | None, executor: ExecutorName
) -> float:
    """How much memory a trained weight needs, as a multiple of its own: see :func:`copies_kept`.

    Raises:
        InputError: if the loss is no function of a result and a target, if the optimizer makes none of a list of
            weights or one that asks for more than gradients, or if one of them cannot travel to workers.
    """
    if isinstance(loss_fn, type):
        raise InputError(f"loss_fn={loss_fn.__name__} is a class: give an object of it, {loss_fn.__name__}(...)")
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"loss_fn={loss_fn!r} is not callable: it is given a result and a target, and gives a scalar")
    copies = _copies(optimizer)
    if executor == "process":
        for name, code in (("loss_fn", loss_fn), ("optimizer", optimizer)):
            _check_travels(name, code)
    return copies


def _copies(optimizer: OptimizerFactory | None) -> float:
    if optimizer is None:  # the caller's is not known: gradients alone
        return 2.0
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer= is a {type(optimizer).__name__} already; every stage has its own: {_OPTIMIZER}")
    try:
        return copies_kept(optimizer)
    except Exception as error:
        raise InputError(
            f"optimizer= cannot update a weight ({type(error).__name__}: {error}): {_OPTIMIZER}"
        ) from error


def _check_travels(name: str, code: Any) -> None:
    try:
        cloudpickle.dumps(code)
    except Exception as error:  # pickling runs user code
        raise InputError(
            f"{name}= cannot be sent to worker processes ({type(error).__name__}: {error}): it must be picklable, with "
            f"all that it refers to; let {name} make or open such a thing itself when it is first called, or use "
            "executor='inline'"
        ) from error


__all__ = ["check_code"]
