"""The command line: what it writes, what it prints, and how it says no."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pipecompile
from pipecompile.cli import main

MODEL = """
import torch
from torch import nn


def make():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, scale, ids):
        return {"scores": self.head(torch.tanh(self.mix(self.embed(ids)))) * scale}


class Picture(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


instance = nn.Linear(2, 2)
number = 3


def needs(argument):
    return argument


def wrong():
    return "no model"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of models in it."""
    (tmp_path / "nets.py").write_text(MODEL)
    return tmp_path


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "pipecompile.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def in_process(
    folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit status and stderr of the command run in this process, without the seconds torch takes to import."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "argv", ["pipecompile", *words])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code, capsys.readouterr().err


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


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


def test_keyword_inputs_and_random(folder: Path) -> None:
    words = ("--input", "ids=2x4:int64", "--input", "2x4x1")
    done(command(folder, "compile", "nets.py:Words", *words, "--devices", "1", "--name", "words"))
    out = done(command(folder, "run", "words.pipe", "--input", "random:9", "--inline", "-o", "scores.npy"))
    assert "9 samples" in out
    assert np.load(folder / "scores.npy").shape == (9, 2, 4, 3)


def test_video(folder: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(6):
            picture = np.full((32, 32, 3), 40 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    done(command(folder, "compile", "nets:Picture", "--input", "1x3x16x16", "-o", "picture.pipe"))
    out = done(command(folder, "run", "picture.pipe", "--input", "clip.mp4", "--inline", "-o", "out.npy"))
    assert "6 samples" in out
    assert np.load(folder / "out.npy").shape == (6, 1, 2, 12, 12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", "nets:mak", "--input", "2x12"], "did you mean 'make'?"),
        (["compile", "netz:make", "--input", "2x12"], "there is no module 'netz'"),
        (["compile", "other.py:make", "--input", "2x12"], "there is no file other.py"),
        (["compile", "nets", "--input", "2x12"], "write MODULE:NAME"),
        (["compile", "nets:number", "--input", "2x12"], "nets:number is a int"),
        (["compile", "nets:needs", "--input", "2x12"], "cannot be called without arguments"),
        (["compile", "nets:wrong", "--input", "2x12"], "returned a str"),
        (["compile", "nets:make", "--input", "2,12"], "write sizes with x between them"),
        (["compile", "nets:make", "--input", "2x12:flaot32"], "did you mean 'float32'?"),
        (["compile", "nets:make", "--input", "2x13"], "shapes cannot be multiplied"),
        (["run", "nothing.pipe", "--input", "random:3"], "nothing.pipe"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors_are_said_without_a_traceback(
    folder: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, stderr = in_process(folder, words, monkeypatch, capsys)
    assert status == 1
    assert said in stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr


def test_run_refuses_what_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with pipecompile.compile(model, example_inputs=(torch.randn(1, 3),), executor="inline") as pipe:
        pipe.save(folder / "net.pipe")
    np.save(folder / "wide.npy", np.zeros((2, 5), np.float32))
    np.save(folder / "empty.npy", np.zeros((0, 3), np.float32))
    (folder / "text.npy").write_text("no array")
    for source, said in [
        ("wide.npy", "must hold the 3 values"),
        ("empty.npy", "not a single sample"),
        ("text.npy", "cannot be read as an array"),
        ("absent.npy", "there is no such file"),
        ("random:none", "write random:100"),
        ("text.mp4", "there is no such file"),
    ]:
        status, stderr = in_process(folder, ["run", "net.pipe", "--input", source, "--inline"], monkeypatch, capsys)
        assert (status, said in stderr) == (1, True), (source, stderr)


def test_status_of_a_real_process(folder: Path) -> None:
    result = command(folder, "run", "nothing.pipe", "--input", "random:3")
    assert result.returncode == 1
    assert "nothing.pipe" in result.stderr
    assert "Traceback" not in result.stderr
