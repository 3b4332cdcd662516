"""The promise: results bit-equal to eager, in order, state kept, in every way a pipeline can run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import pipecompile
from models import CASES, CORE, REFUSED, REST, Case
from models.compare import differences
from models.registry import Call

Executor = Literal["inline", "process"]
Way = tuple[Case, int, Executor, str]
"""A case, the number of stages, who runs them, and where they come from: memory, loaded or both."""

QUICK: list[Way] = [
    *product(CORE, (2, 3), ("inline",), ("both",)),
    *product(CORE[::3], (2,), ("process",), ("memory",)),
    *product(CORE[1::6], (3,), ("process",), ("loaded",)),
]
EVERYTHING: list[Way] = [
    *product(CORE, (2, 3), ("process",), ("both",)),
    *product(REST, (2,), ("inline",), ("both",)),
    *product(REST, (3,), ("process",), ("both",)),
]


def reference(case: Case) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Eager results of every call in order, and the buffers as the last call leaves them."""
    model, calls = case.make()
    with torch.no_grad():
        # results are copied at once: they may be the buffers a later call writes to
        results = [copy.deepcopy(model(*args, **kwargs)) for args, kwargs in calls]
    return results, buffers(model)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state that is no parameter, the one outside ``state_dict`` included."""
    return {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def compiled(case: Case, stages: int, executor: Executor) -> tuple[Any, nn.Module, list[Any]]:
    """A pipeline of the case, the model it was made from, and the calls."""
    model, calls = case.make()
    args, kwargs = calls[0]
    with quiet():
        pipe = pipecompile.compile(
            model,
            example_inputs=args,
            example_kwargs=kwargs,
            devices=stages,
            executor=executor,
            profile_seconds=0.05,
            imports=case.imports,
        )
    return pipe, model, calls


def check(case: Case, stages: int, executor: Executor, source: str, folder: Path) -> None:
    """Run in memory, loaded from a folder, or one after the other."""
    expected, state = reference(case)
    pipe, model, calls = compiled(case, stages, "inline" if source == "loaded" else executor)
    with pipe:
        if source != "memory":
            pipe.save(folder / "saved.pipe")
        if source != "loaded":
            agree(pipe, calls, expected)
            assert not differences(buffers(model), state, "buffers")
    if source != "memory":
        del pipe, model
        with quiet(), pipecompile.load(folder / "saved.pipe", executor=executor, trust=bool(case.imports)) as pipe:
            agree(pipe, calls, expected)


def agree(pipe: Any, calls: list[Call], expected: list[Any]) -> None:
    """Called one by one, and streamed after a reset, the pipeline equals eager and ends in its state."""
    wrong: list[str] = []
    for i, ((args, kwargs), want) in enumerate(zip(calls, expected, strict=True)):
        wrong += differences(pipe(*args, **kwargs), want, f"call {i}")
    assert not wrong
    pipe.reset_state()
    # an item of a stream is a tuple or a dict: a call with both kinds of arguments has no such form
    if not all(args and kwargs for args, kwargs in calls):
        items = [args or kwargs for args, kwargs in calls]
        for i, (got, want) in enumerate(zip(pipe.stream(items), expected, strict=True)):
            wrong += differences(got, want, f"streamed {i}")
    else:
        for args, kwargs in calls:
            pipe(*args, **kwargs)
    assert not wrong


@contextmanager
def quiet() -> Iterator[None]:
    """Fewer layers than devices, more devices than cores: said as warnings, and not wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
        yield


def label(value: Any) -> str:
    return str(value)


@pytest.mark.parametrize(("case", "stages", "executor", "source"), QUICK, ids=label)
def test_core_is_bit_equal(case: Case, stages: int, executor: Executor, source: str, tmp_path: Path) -> None:
    check(case, stages, executor, source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stages", "executor", "source"), EVERYTHING, ids=label)
def test_zoo_is_bit_equal(case: Case, stages: int, executor: Executor, source: str, tmp_path: Path) -> None:
    check(case, stages, executor, source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED, ids=label)
def test_refused_with_a_reason(case: Case) -> None:
    with pytest.raises(pipecompile.TraceError) as caught:
        compiled(case, 2, "inline")
    assert len(str(caught.value).splitlines()[0]) > 20


def test_parameters_stay_the_models_own() -> None:
    model, calls = CASES["mlp"].make()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pipecompile.compile(model, example_inputs=calls[0][0], devices=2, executor="inline") as pipe:
        pipe(*calls[0][0])
        after = dict(model.named_parameters())
        assert {name: id(p) for name, p in after.items()} == {name: key for name, (key, _) in before.items()}
        assert not differences({n: p.detach() for n, p in after.items()}, {n: v for n, (_, v) in before.items()})


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_results_own_their_memory(executor: Executor) -> None:
    """A result kept over later samples does not change under the caller."""
    model, _ = CASES["mlp"].make()
    inputs = [torch.randn(4, 16) for _ in range(40)]
    with torch.no_grad():
        expected = [model(x).clone() for x in inputs]
    with pipecompile.compile(model, example_inputs=(inputs[0],), devices=2, executor=executor) as pipe:
        kept = list(pipe.stream(inputs))
    assert not differences(kept, expected)


def test_weights_changed_in_place_are_seen() -> None:
    """Both sides share the storage: an in-place update of a parameter reaches the stages."""
    model, calls = CASES["mlp"].make()
    x = calls[0][0][0]
    with pipecompile.compile(model, example_inputs=(x,), devices=2, executor="process") as pipe:
        first = pipe(x).clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
            expected = model(x)
        assert differences(first, expected)
        assert not differences(pipe(x), expected)


def test_the_comparison_notices() -> None:
    """The oracle itself: each kind of difference is reported."""
    one = {"a": torch.tensor([1.0, float("nan")]), "b": (1, None)}
    assert not differences(copy.deepcopy(one), one)
    assert differences({**one, "a": torch.tensor([1.0, 2.0])}, one)
    assert differences({**one, "a": one["a"].double()}, one)
    assert differences({**one, "b": [1, None]}, one)
    assert differences({**one, "b": (2, None)}, one)
    assert differences({"a": one["a"]}, one)
