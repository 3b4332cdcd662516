"""The decorator, one promise a test: still an nn.Module, compiled when used, never stale."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import decorated_models as models
import pipecompile
from pipecompile.errors import InputError, PipecompileWarning
from pipecompile.guards import Guards, depends_on_mode
from pipecompile.ir.sample import Sample


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def x(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def original(net: models.Net, value: torch.Tensor) -> torch.Tensor:
    """What a Net gives, spelt out: no code of the decorator's takes part."""
    hidden = torch.relu(nn.functional.linear(value, net.first.weight, net.first.bias))
    return nn.functional.linear(hidden, net.second.weight, net.second.bias) * net.gain


def eager(net: nn.Module, value: torch.Tensor, said: str) -> torch.Tensor:
    """Call, and see that it says why it runs eager; a second time it says nothing."""
    with pytest.warns(PipecompileWarning, match=said) as warned:
        result = net(value)
    assert warned[0].filename == __file__, "it points at the line that called"
    net(value)  # warnings are errors here, so a second one would raise
    return result


def test_a_call_the_model_refuses_raises_what_the_model_raises() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        models.Net()(torch.randn(2, 7))


def test_the_first_call_compiles_and_gives_what_the_model_gives() -> None:
    net = models.Net()
    assert net.pipeline is None
    assert torch.equal(net(x()), original(net, x()))
    assert isinstance(net.pipeline, pipecompile.InferencePipeline)
    assert len(net.pipeline.plan.stages) == 2
    pipe = net.pipeline
    assert torch.equal(net(x() + 1), original(net, x() + 1))
    assert net.pipeline is pipe, "compiled once"
    assert torch.equal(net.forward(x()), original(net, x())), "forward() directly"


def test_real_workers_compute_it() -> None:
    with contextlib.closing(models.Working()) as net:
        assert torch.equal(net(x()), original(net, x()))
        pids = net.pipeline._engine.session.pids
        assert len(pids) == 2
        assert all(_runs(pid) for pid in pids)
        with torch.no_grad():
            net.first.weight.mul_(3)
        assert torch.equal(net(x()), original(net, x())), "changed in place: seen by the next sample"
        assert net.pipeline._engine.session.pids == pids
    assert _gone(pids), "close() ends the workers"
    assert torch.equal(net(x()), original(net, x())), "and the next call starts anew"
    pids = net.pipeline._engine.session.pids
    gc.disable()
    try:
        del net
        assert _gone(pids), "so does the end of the model, without the cycle collector"
    finally:
        gc.enable()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _gone(pids: tuple[int, ...]) -> bool:
    limit = time.monotonic() + 10
    while any(map(_runs, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    return not any(map(_runs, pids))


def test_the_class_stays_what_it_is() -> None:
    assert models.Net.__module__ == "decorated_models"
    assert models.Net.__qualname__ == "Net"
    assert models.Net.__doc__ is not None
    net = models.Net()
    assert isinstance(net, nn.Module)
    assert isinstance(net, models.Net)
    attributes = set(vars(net))
    net(x())
    assert set(vars(net)) == attributes, "nothing of ours is in the instance"
    assert list(net.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [name for name, _ in net.named_modules()] == ["", "first", "second"]


def test_train_eval_and_to_work() -> None:
    net = models.Net()
    assert net.train().training
    assert not net.eval().first.training
    net(x())
    net.to(torch.float64)
    with pytest.warns(PipecompileWarning, match=r"has changed \(first\.weight"):
        result = net(x().double())
    assert result.dtype is torch.float64
    assert torch.equal(result, original(net, x().double()))
    net.to("meta")
    assert eager(net, torch.empty(2, 8, dtype=torch.float64, device="meta"), "is on meta").device.type == "meta"


@pytest.mark.parametrize("before_use", [True, False])
def test_copies_and_pickles_are_of_the_original(before_use: bool) -> None:
    net = models.Net()
    expected = net(x()) if not before_use else original(net, x())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other) is models.Net
        assert other.pipeline is None
        assert torch.equal(other(x()), expected)
        with torch.no_grad():
            other.first.weight.zero_()
        assert torch.equal(net(x()), expected), "nothing is shared"


def test_torch_save_of_model_and_state(tmp_path: Any) -> None:
    net = models.Net()
    expected = net(x())
    torch.save(net, tmp_path / "net.pt")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(x()), expected)
    other = models.Net()
    other.first.weight.zero_()
    other(x())
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x()), expected)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    assert b"pipecompile" not in buffer.getvalue().replace(b"decorated_models", b"")


def test_a_subclass_is_a_pipeline_with_its_own_forward() -> None:
    twice, same = models.Twice(), models.Same()
    assert torch.equal(twice(x()), original(twice, x()) + original(twice, x() + 1))
    assert twice.pipeline.package.model == "Twice"
    assert torch.equal(same(x()), original(same, x()))
    assert same.pipeline.package.model == "Same"
    again = models.Redecorated()
    assert torch.equal(again(x()), original(again, x()) * 3)
    assert len(again.pipeline.plan.stages) == 1, "its own options count"
    assert models.Registered.seen == ["registered"]
    registered = models.WithRegistry()
    assert torch.equal(registered(x()), original(registered, x()))


def test_a_forward_put_in_place_later_is_run() -> None:
    net = models.Net()
    net(x())
    net.forward = lambda value: value * 5  # type: ignore[method-assign]
    assert torch.equal(net(x()), x() * 5)

    class Patched(models.Net):
        pass

    Patched.forward = lambda self, value: models.Net.forward(self, value) * 7
    patched = Patched()
    assert torch.equal(patched(x()), original(patched, x()) * 7)


def test_a_decorated_module_inside_another() -> None:
    outer = models.Outer()
    expected = outer.head(original(outer.inner, x()))
    assert torch.equal(outer(x()), expected)
    assert outer.pipeline is not None
    assert outer.inner.pipeline is None, "it runs within its parent's pipeline"
    plain = models.Plain()
    assert torch.equal(plain(x()), plain.head(original(plain.inner, x())))
    assert plain.inner.pipeline is not None, "here the inner one is the pipeline"
    with pipecompile.compile(models.Plain(), (x(),), devices=2, executor="inline") as pipe:
        assert torch.equal(pipe(x()), pipe._model.head(original(pipe._model.inner, x())))
        assert pipe._model.inner.pipeline is None, "capture saw the original"


def test_example_inputs_compile_before_the_first_call() -> None:
    net = models.Prepared()
    pipe = net.pipeline
    assert pipe is not None
    assert torch.equal(net(x()), original(net, x()))
    assert net.pipeline is pipe
    assert len(list(models.Prepared().pipeline.stream([x()] * 3))) == 3


def test_a_new_shape_compiles_again_says_so_once_and_keeps_a_few() -> None:
    net = models.Net()
    net(x(2))
    kept = [net.pipeline]
    with pytest.warns(PipecompileWarning, match=r"another form of call \(input 'x' has shape 3x8, compiled for 2x8"):
        net(x(3))
    for rows in (4, 5):
        assert torch.equal(net(x(rows)), original(net, x(rows)))
    kept.append(net.pipeline)
    net(x(2))
    assert net.pipeline is kept[0], "the one of the first shape is still there"
    assert torch.equal(net(x(6)), original(net, x(6)))  # the fifth: 3x8 was unused for longest
    assert not kept[0].closed
    assert not kept[1].closed
    net(x(7))
    net(x(1))
    assert torch.equal(net(x(2)), original(net, x(2)))
    assert torch.equal(net(x(2), flag=True), -original(net, x(2))), "another constant is another form"


def test_a_new_shape_is_refused_by_option() -> None:
    net = models.Strict()
    net(x(2))
    with pytest.raises(InputError, match="has shape 3x8, compiled for 2x8"):
        net(x(3))
    assert torch.equal(net(x(2)), original(net, x(2)))


def test_gradients_mean_eager() -> None:
    net = models.Net()
    with torch.enable_grad():
        loss = eager(net, x(), "Net runs eager, not as a pipeline: gradients are enabled").sum()
        loss.backward()
    assert net.first.weight.grad is not None
    assert net.pipeline is None, "nothing was compiled for it"
    net.requires_grad_(False)
    with torch.enable_grad():
        assert torch.equal(net(x()), original(net, x()))
        assert net.pipeline is not None, "no gradient would be recorded here"
        wanted = x().requires_grad_()
        net(wanted).sum().backward()
        assert wanted.grad is not None


def test_training_mode_means_eager_where_it_differs() -> None:
    net = models.Dropping().train()
    assert (
        eager(net, torch.ones(2, 8), r"training mode, in which 1 may behave otherwise") != net(torch.ones(2, 8))
    ).any()
    net.eval()
    assert torch.equal(net(x()), net[2](net[0](x())))
    assert net.pipeline is not None
    simple = models.Net().train()
    assert torch.equal(simple(x()), original(simple, x()))
    assert simple.pipeline is not None, "nothing in it knows of modes"


def test_which_classes_depend_on_their_mode() -> None:
    assert depends_on_mode(nn.Dropout)
    assert depends_on_mode(nn.BatchNorm2d)
    assert depends_on_mode(nn.TransformerEncoderLayer)
    assert depends_on_mode(nn.LSTM)
    assert not depends_on_mode(nn.Linear)
    assert not depends_on_mode(nn.Sequential)
    assert not depends_on_mode(nn.Conv2d)


def test_replaced_storage_is_never_stale() -> None:
    net = models.Net()
    net(x())
    net.load_state_dict({name: torch.randn_like(t) for name, t in net.state_dict().items()}, assign=True)
    assert torch.equal(net(x()), original(net, x()))
    net.first.weight.data = torch.ones(8, 8)
    assert torch.equal(net(x()), original(net, x()))
    net.second.bias = nn.Parameter(torch.full((8,), 4.0))
    assert torch.equal(net(x()), original(net, x()))
    net.first.weight.mul_(-2)
    assert torch.equal(net(x()), original(net, x()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: setattr(net, "first", nn.Linear(8, 8)), "other attributes or submodules"),
        (lambda net: setattr(net, "gain", 5.0), "Net.gain is 5.0, no longer 2.0"),
        (lambda net: setattr(net.first, "bias", None), "first.bias was replaced"),
        (lambda net: net.requires_grad_(False), "first.weight was replaced or is of another"),
        (lambda net: net.double(), "first.weight was replaced or is of another"),
    ],
)
def test_a_changed_model_is_compiled_again(change: Any, said: str) -> None:
    net = models.Net()
    net(x())
    change(net)
    value = x().to(net.second.weight.dtype)
    with pytest.warns(PipecompileWarning, match=said):
        assert torch.equal(net(value), original(net, value))
    assert torch.equal(net(value), original(net, value))


def test_a_forward_hook_means_eager_while_it_is_there() -> None:
    net, seen = models.Net(), list[torch.Tensor]()
    net(x())
    handle = net.second.register_forward_hook(lambda module, args, out: seen.append(out))
    result = eager(net, x(), "second has a forward hook")
    assert torch.equal(result, seen[0] * net.gain)
    handle.remove()
    net(x())
    assert len(seen) == 2, "the pipeline again"
    handle = net.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert torch.equal(net(x()), original(net, x() * 0))
    handle.remove()
    assert torch.equal(net(x()), original(net, x()))


def test_functional_call_and_transforms_run_the_original() -> None:
    net = models.Net()
    net(x())
    state = {name: t.clone() * 2 for name, t in net.state_dict().items()}
    twice = models.Net()
    twice.load_state_dict(state)
    with pytest.warns(PipecompileWarning, match=r"weight is substituted, as functional_call does"):
        result = torch.func.functional_call(net, state, (x(),))
    assert torch.equal(result, original(twice, x()))
    assert torch.equal(net(x()), original(net, x())), "and nothing of it stays"
    with pytest.warns(PipecompileWarning, match="no plain tensor"):
        batched = torch.func.vmap(net)(torch.stack([x(), x() + 1]))
    assert torch.allclose(batched[1], original(net, x() + 1), atol=1e-6)
    with torch.enable_grad():
        jacobian = torch.func.jacrev(net)(x()[0])
    assert jacobian.shape == (8, 8)


def test_torch_compile_and_export_see_the_original() -> None:
    net = models.Net()
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x()), original(net, x()))
    exported = torch.export.export(net, (x(),), strict=False)
    assert torch.equal(exported.module()(x()), original(net, x()))
    assert net.pipeline is None


def test_autocast_means_eager() -> None:
    net = models.Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert eager(net, x(), "autocast is enabled").dtype is torch.bfloat16
    assert net(x()).dtype is torch.float32


def test_inference_mode_and_back() -> None:
    net = models.Net()
    with torch.inference_mode():
        assert torch.equal(net(x()), original(net, x()))
    assert torch.equal(net(x()), original(net, x()))


def test_streaming_through_a_decorated_model() -> None:
    net = models.Net()
    xs = [x() + i for i in range(10)]
    with torch.enable_grad():  # a stream records no gradients, whatever the mode
        got = list(net.stream(xs))
    assert all(torch.equal(a, original(net, b)) for a, b in zip(got, xs, strict=True))
    assert not got[0].requires_grad
    assert torch.equal(torch.stack(list(net.pipeline.stream(xs))), torch.stack(got))
    assert list(models.Net().stream([])) == []
    samples = [Sample(value, float(i)) for i, value in enumerate(xs)]
    assert all(torch.equal(a, b) for a, b in zip(models.Net().stream(samples), got, strict=True))
    with pytest.raises(InputError, match="cannot stream as a pipeline: it is in training mode"):
        list(models.Dropping().train().stream(xs))


def test_close_and_use_again() -> None:
    net = models.Net()
    net(x())
    pipe = net.pipeline
    net.close()
    net.close()
    assert pipe.closed
    assert net.pipeline is None
    assert torch.equal(net(x()), original(net, x()))
    net.pipeline.close()  # by somebody else
    assert torch.equal(net(x()), original(net, x()))


def test_a_model_that_cannot_be_captured_says_why() -> None:
    @pipecompile.pipeline(**models.FAST)
    class Branching(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value if value.sum() > 0 else -value

    with pytest.raises(pipecompile.TraceError, match=r"test_decorator\.py"):
        Branching().eval()(x())


def test_without_parameters_and_with_a_single_layer() -> None:
    @pipecompile.pipeline(executor="inline")
    class Relu(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value.relu()

    net = Relu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)  # one layer, two devices
        assert torch.equal(net(x()), x().relu())


def test_misuse_is_refused_when_decorating() -> None:
    with pytest.raises(TypeError, match="no option 'device'"):
        pipecompile.pipeline(device=2)
    with pytest.raises(TypeError, match="decorates a class, not a model: for this Linear use"):
        pipecompile.pipeline(devices=2)(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"decorates a torch\.nn\.Module class"):
        pipecompile.pipeline(devices=2)(int)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="inference"):
        pipecompile.pipeline(mode="train")
    with pytest.raises(TypeError, match="new_shape='ignore'"):
        pipecompile.pipeline(new_shape="ignore")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="at least one"):
        pipecompile.pipeline(max_pipelines=0)
    with pytest.raises(InputError, match="an attribute 'stream' of its own"):

        @pipecompile.pipeline
        class Streaming(nn.Module):
            def stream(self) -> None:
                pass

    @pipecompile.pipeline
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.close = nn.Linear(2, 2)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value

    with pytest.raises(InputError, match="sets 'close'"):
        Later()(x())
    assert models.Bare().pipeline is None


def test_guards_hold_no_reference_to_the_model() -> None:
    net = models.Net()
    guards = Guards(net)
    assert not any(referrer is net for referrer in gc.get_referents(guards, *gc.get_referents(guards)))
    assert guards.changed() == ""


FORK = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import decorated_models as models
with torch.no_grad():
    net = models.Working()
    value = torch.ones(2, 8)
    expected = net(value)
    child = os.fork()
    if not child:
        same = torch.equal(net(value), expected)
        net.close()
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(net(value), expected), "the parent goes on"
"""


def test_a_forked_process_gets_pipelines_of_its_own(tmp_path: Any) -> None:
    script = tmp_path / "fork.py"
    script.write_text(FORK)
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, str(script), here], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
