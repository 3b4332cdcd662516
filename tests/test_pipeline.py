"""What users hold: calls and their checks, state, dynamic sizes, moving weights."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.errors import InputError, PipelineClosed, PlanError


def compiled(model: nn.Module, *args: Any, **options: Any) -> pipecompile.InferencePipeline:
    options = {"devices": 2, "executor": "inline", "profile_seconds": 0.05, **options}
    return pipecompile.compile(model.eval(), args, **options)


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 2.0, flag: bool = False) -> torch.Tensor:
        return (x + y) * scale if not flag else x - y


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((torch.ones(3),), {}, "compiled for x, y; in this call y is missing"),
        ((torch.ones(3), torch.ones(3), 5.0), {}, "scale is not in the example inputs"),
        ((torch.ones(3), torch.ones(3).numpy()), {}, "argument 'y': a numpy.ndarray .*torch.from_numpy"),
        ((torch.ones(4), torch.ones(3)), {}, "'x' has shape 4, compiled for 3"),
        ((torch.ones(3), torch.ones(3, dtype=torch.float64)), {}, "'y' has dtype torch.float64"),
        ((torch.ones(3), torch.ones(3, device="meta")), {}, "'y' is on meta"),
        ((torch.ones(3), [torch.ones(3)]), {}, "another structure"),
        ((torch.ones(3), None), {}, "another structure"),
        ((torch.ones(3), torch.ones(3)), {"z": torch.ones(3)}, "z is not in the example inputs"),
        ((torch.ones(3), torch.ones(3)), {"x": torch.ones(3)}, "x is given twice"),
        ((1.0,) * 5, {}, "5 positional arguments are given"),
    ],
)
def test_a_call_that_does_not_fit_says_what_is_wrong(args: Any, kwargs: Any, words: str) -> None:
    with compiled(Two(), torch.ones(3), torch.ones(3)) as pipe:
        with pytest.raises(InputError, match=words):
            pipe(*args, **kwargs)
        assert torch.equal(pipe(torch.ones(3), torch.ones(3)), torch.full((3,), 4.0)), "the pipeline goes on"


def test_arguments_may_be_named_otherwise_than_in_the_example() -> None:
    x, y = torch.randn(3), torch.randn(3)
    with compiled(Two(), x, y) as pipe:
        expected = Two()(x, y)
        assert torch.equal(pipe(x, y=y), expected)
        assert torch.equal(pipe(y=y, x=x), expected)


def test_other_constants_are_refused_with_the_one_compiled() -> None:
    with compiled(Two(), torch.ones(3), torch.ones(3), 3.0) as pipe, pytest.raises(InputError, match=r"2\.5.*3\.0"):
        pipe(torch.ones(3), torch.ones(3), 2.5)


def test_values_that_are_not_numbers_pass_through() -> None:
    with compiled(nn.Sequential(nn.Identity(), nn.Hardtanh()), torch.zeros(3), devices=1) as pipe:
        out = pipe(torch.tensor([float("nan"), float("inf"), 0.5]))
    assert out[0].isnan()
    assert torch.equal(out[1:], torch.tensor([1.0, 0.5]))


class Ema(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.5).add_(x, alpha=0.5)
        return self.linear(x - self.mean)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_state_persists_in_order_and_resets(executor: str) -> None:
    torch.manual_seed(0)
    model, reference = Ema().eval(), Ema().eval()
    reference.load_state_dict(model.state_dict())
    samples = [torch.randn(4) for _ in range(12)]
    with torch.no_grad():
        expected = [reference(x) for x in samples]
    with compiled(model, samples[0], executor=executor) as pipe:
        for _ in range(2):
            got = list(pipe.stream(samples))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert torch.equal(model.mean, reference.mean)
            pipe.reset_state()
            assert torch.equal(model.mean, torch.zeros(4))


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_dynamic_sizes_grow_and_shrink_within_a_stream(executor: str) -> None:
    model = mlp()
    length = torch.export.Dim("length", min=1, max=4096)
    with compiled(model, torch.randn(3, 8), dynamic_shapes=({0: length},), executor=executor) as pipe:
        samples = [torch.randn(n, 8) for n in (3, 1, 2, 700, 5, 64, 2000, 3)]
        for x, y in zip(samples, pipe.stream(samples), strict=True):
            assert torch.allclose(y, model(x), atol=1e-6)
            assert y.shape == (len(x), 8)
        with pytest.raises(InputError, match="4097"):
            pipe(torch.randn(4097, 8))


def test_replaced_storage_is_seen() -> None:
    model, x = mlp(), torch.randn(2, 8)
    with compiled(model, x) as pipe:
        pipe(x)
        model.load_state_dict({name: t.clone() * 2 for name, t in model.state_dict().items()}, assign=True)
        assert torch.equal(pipe(x), model(x))
        model[0].weight.data = torch.zeros(8, 8)
        assert torch.equal(pipe(x), model(x))


def test_a_changed_dtype_is_refused() -> None:
    model, x = mlp(), torch.randn(2, 8)
    with compiled(model, x) as pipe:
        pipe(x)
        model.double()
        with pytest.raises(InputError, match="compile the model again"):
            pipe(x)


def test_a_pipeline_is_neither_converted_nor_copied() -> None:
    with compiled(mlp(), torch.randn(2, 8)) as pipe:
        assert pipe.to("cpu") is pipe
        assert pipe.float() is pipe
        for convert in (pipe.half, pipe.double, lambda: pipe.to("meta")):
            with pytest.raises(InputError, match="convert the model, and compile it again"):
                convert()
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"running workers .* save\(\) it"):
                copied(pipe)


@pytest.mark.parametrize("source", [None, 5])
def test_what_is_no_source_is_refused_at_once(source: Any) -> None:
    with (
        compiled(mlp(), torch.randn(2, 8)) as pipe,
        pytest.raises(InputError, match="takes an iterable of samples"),
    ):
        pipe.stream(source)


def test_names_are_the_model_s_own() -> None:
    model = mlp()
    with compiled(model, torch.randn(2, 8)) as pipe:
        assert list(pipe.state_dict()) == list(model.state_dict())
        assert [id(p) for p in pipe.parameters()] == [id(p) for p in model.parameters()]
        assert isinstance(pipe, nn.Module)
        other = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
        pipe.load_state_dict(other)
        x = torch.randn(2, 8)
        assert torch.equal(pipe(x), model(x))


def test_ending_a_stream_early_leaves_the_pipeline_usable() -> None:
    model, xs = mlp(), [torch.randn(2, 8) for _ in range(20)]
    with compiled(model, xs[0]) as pipe:
        stream = pipe.stream(xs)
        next(stream)
        stream.close()
        assert all(torch.equal(a, model(b)) for a, b in zip(pipe.stream(xs), xs, strict=True))


def test_a_call_inside_a_stream_is_refused() -> None:
    model, x = mlp(), torch.randn(2, 8)
    with compiled(model, x) as pipe:
        stream = pipe.stream([x] * 5)
        next(stream)
        with pytest.raises(InputError, match="busy"):
            pipe(x)
        assert len(list(stream)) == 4


def test_a_source_that_raises_ends_the_stream_with_its_own_error() -> None:
    def source() -> Any:
        yield torch.randn(2, 8)
        raise ValueError("the camera is gone")

    with compiled(mlp(), torch.randn(2, 8)) as pipe:
        with pytest.raises(ValueError, match="camera"):
            list(pipe.stream(source()))
        assert pipe(torch.zeros(2, 8)).shape == (2, 8)


def test_empty_stream_and_zero_size_batch() -> None:
    with compiled(mlp(), torch.randn(0, 8)) as pipe:
        assert list(pipe.stream([])) == []
        assert pipe(torch.randn(0, 8)).shape == (0, 8)


def test_use_after_close() -> None:
    pipe = compiled(mlp(), torch.randn(2, 8))
    pipe.close()
    pipe.close()
    with pytest.raises(PipelineClosed, match="closed"):
        pipe(torch.randn(2, 8))


def test_more_devices_than_layers_and_than_cores_are_said() -> None:
    with pytest.warns(pipecompile.PipecompileWarning) as caught:
        pipe = compiled(nn.Linear(3, 3), torch.randn(3), devices=7)
    assert len(pipe.plan.stages) == 1
    text = " ".join(str(w.message) for w in caught)
    assert {w.filename for w in caught} == {__file__}
    assert "1 used" in text
    assert "cores" in text
    x = torch.randn(3)
    assert torch.equal(pipe(x), pipe._model(x))
    pipe.close()


@pytest.mark.parametrize("devices", [0, -1, [], ["tpu:0"], ["cpu"], ["cpu:99"]])
def test_impossible_devices_are_refused(devices: Any) -> None:
    with pytest.raises(PlanError):
        compiled(mlp(), torch.randn(2, 8), devices=devices)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(PlanError, match="choose 'infer'"):
        compiled(mlp(), torch.randn(2, 8), mode="fly")


def test_options_of_the_other_mode_and_of_none() -> None:
    with pytest.raises(InputError, match="loss_fn= and optimizer= go together"):
        compiled(mlp(), torch.randn(2, 8), mode="train", loss_fn=nn.MSELoss())
    with pytest.raises(InputError, match="micro_batches: only mode='train' takes that"):
        compiled(mlp(), torch.randn(2, 8), micro_batches=2)
    with pytest.raises(InputError, match="executor='thread' is neither 'process' nor 'inline'"):
        compiled(mlp(), torch.randn(2, 8), executor="thread")
    with pytest.raises(TypeError, match="no option 'device'; did you mean 'devices'"):
        compiled(mlp(), torch.randn(2, 8), device=2)


def test_repeated_compilation_leaks_no_tensors() -> None:
    model, x = mlp(), torch.randn(2, 8)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(2):
        with compiled(model, x) as pipe:
            pipe(x)
    before = alive()
    for _ in range(3):
        with compiled(model, x) as pipe:
            pipe(x)
    del pipe
    assert alive() <= before + 8


def test_prediction_and_measurement_have_one_type() -> None:
    with compiled(mlp(), torch.randn(2, 8)) as pipe:
        list(pipe.stream([torch.randn(2, 8)] * 10))
        predicted, measured = pipe.simulate(16), pipe.timeline()
    assert (predicted.origin, measured.origin) == ("simulated", "measured")
    assert type(predicted) is type(measured)
    assert predicted.throughput > 0


def test_report_writes_a_page_before_and_after_a_run(tmp_path: Path) -> None:
    with compiled(mlp(), torch.randn(2, 8)) as pipe:
        before = pipe.report(tmp_path / "before.html").read_text()
        list(pipe.stream([torch.randn(2, 8)] * 10))
        after = pipe.report(tmp_path / "after.html").read_text()
        assert "nothing was run" in before
        assert "Measured over 10 samples" in after
        with pytest.raises(InputError, match=r"cannot write .*absent"):
            pipe.report(tmp_path / "absent" / "page.html")


def test_models_may_be_compiled_in_several_threads_at_once() -> None:
    """Torch's capture holds state of the whole process, so they take turns."""
    x, failed = torch.randn(4, 3), list[BaseException]()
    trained: dict[str, Any] = {"mode": "train", "loss_fn": nn.MSELoss(), "optimizer": partial(torch.optim.SGD, lr=0.1)}

    def compile_one(options: dict[str, Any]) -> None:
        try:
            for _ in range(2):
                model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
                pipecompile.compile(model, (x,), executor="inline", profile_seconds=0.02, **options).close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=compile_one, args=(options,)) for options in ({}, trained)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
