"""The command line: what it writes, what it prints, and how it says no."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pipecompile
from commands import MODEL, command, done


def test_help_has_examples_and_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom pipecompile.cli import cli\ncli(['run', '--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    text = done(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False))
    assert "pipecompile run net.pipe --input random:200" in text
    assert "--devices" in done(command(folder, "compile", "--help"))


def test_compile_then_run_array(folder: Path) -> None:
    out = done(command(folder, "compile", "nets:make", "--input", "2x12", "-o", "net.pipe"))
    assert "predicted ms" in out
    assert "wrote" in out
    assert (folder / "net.pipe" / "manifest.json").is_file()
    frames = np.random.default_rng(0).standard_normal((7, 2, 12)).astype(np.float32)
    np.save(folder / "frames.npy", frames)
    out = done(command(folder, "run", "net.pipe", "--input", "frames.npy", "--output", "scores.npy"))
    assert "7 samples" in out
    assert "latency" in out
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    model = namespace["make"]()  # type: ignore[operator]
    with torch.no_grad():
        expected = torch.stack([model(torch.from_numpy(frame)) for frame in frames])
    assert torch.equal(torch.from_numpy(np.load(folder / "scores.npy")), expected)


def test_keyword_inputs_and_random(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    words = ("--input", "ids=2x4:int64", "--input", "2x4x1")
    status, _, err = run("compile", "nets.py:Words", *words, "--devices", "1", "--name", "words")
    assert status == 0, err
    status, out, err = run("run", "words.pipe", "--input", "random:9", "--inline", "-o", "scores.npy")
    assert status == 0, err
    assert "9 samples" in out
    assert np.load(folder / "scores.npy").shape == (9, 2, 4, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "nets:mak", "--input", "2x12"], "did you mean 'make'?"),
        (["compile", "netz:make", "--input", "2x12"], "there is no module 'netz'"),
        (["compile", "other.py:make", "--input", "2x12"], "there is no file other.py"),
        (["compile", "nets", "--input", "2x12"], "write MODULE:NAME"),
        (["compile", "nets:number", "--input", "2x12"], "nets:number is of type int"),
        (["compile", "nets:needs", "--input", "2x12"], "cannot be called without arguments"),
        (["compile", "nets:wrong", "--input", "2x12"], "returned something of type str"),
        (["compile", "nets:make", "--input", "2,12"], "write sizes with x between them"),
        (["compile", "nets:make", "--input", "2x12:flaot32"], "did you mean 'float32'?"),
        (["compile", "nets:make", "--input", "2x13"], "shapes cannot be multiplied"),
        (["compile", "nets:breaks", "--input", "2x12"], "nets:breaks() raised RuntimeError: no weights here"),
        (["compile", "nets:make", "--input", "2x12", "--devices", "0"], "at least one device is needed"),
        (["compile", "nets:make", "--input", "2x12", "--devices", "tpu:0"], "unknown device 'tpu:0'"),
        (["compile", "nets:make", "--input", "2x12", "--devices", "cpu:0,cpu:99"], "there is no device 'cpu:99'"),
        (["compile", "nets:Branching", "--input", "2x12"], "nets.py:"),
        (["compile", "nets:make", "--input", "2x12", "-o", "nets.py/x.pipe"], "cannot write to nets.py"),
        (["compile", "nets:make", "--input", "2x12", "-o", "."], "exists and is not a saved pipeline"),
        (["run", "nothing.pipe", "--input", "random:3"], "nothing.pipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors_are_said_without_a_traceback(
    words: list[str], said: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, stderr = run(*words)
    assert status == 1
    assert said in stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr


def test_run_refuses_what_does_not_fit(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with pipecompile.compile(model, example_inputs=(torch.randn(1, 3),), executor="inline") as pipe:
        pipe.save(folder / "net.pipe")
    np.save(folder / "wide.npy", np.zeros((2, 5), np.float32))
    np.save(folder / "empty.npy", np.zeros((0, 3), np.float32))
    (folder / "text.npy").write_text("no array")
    for source, said in [
        ("wide.npy", "must hold the 3 values"),
        ("empty.npy", "not a single sample"),
        ("text.npy", "no array as numpy.save writes it"),
        ("absent.npy", "there is no such file"),
        ("random:none", "write random:100"),
        ("text.mp4", "there is no such file"),
    ]:
        status, _, stderr = run("run", "net.pipe", "--input", source, "--inline")
        assert (status, said in stderr) == (1, True), (source, stderr)


def test_status_of_a_real_process(folder: Path) -> None:
    result = command(folder, "run", "nothing.pipe", "--input", "random:3")
    assert result.returncode == 1
    assert "nothing.pipe" in result.stderr
    assert "Traceback" not in result.stderr


def test_models_without_parameters_and_of_a_single_layer(
    folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = run("compile", "nets:Bare", "--input", "3x4", "--devices", "1", "-o", "bare.pipe")
    assert (status, "wrote bare.pipe" in out) == (0, True), err
    np.save(folder / "x.npy", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    status, _, err = run("run", "bare.pipe", "--input", "x.npy", "-o", "y.npy", "--inline")
    assert status == 0, err
    assert np.allclose(np.load(folder / "y.npy"), np.tanh(np.load(folder / "x.npy")), atol=1e-6)
    result = command(folder, "compile", "nets:instance", "--input", "1x2", "--devices", "2", "-o", "one.pipe")
    assert done(result)
    assert "note: 2 devices asked for" in result.stderr, "one layer cannot use two devices, and that is said"


def test_a_truncated_artefact_is_named(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("compile", "nets:make", "--input", "2x12", "-o", "net.pipe")[0] == 0
    weights = folder / "net.pipe" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    status, _, err = run("run", "net.pipe", "--input", "random:3")
    assert status == 1
    assert "weights.safetensors" in err
    assert "Traceback" not in err
