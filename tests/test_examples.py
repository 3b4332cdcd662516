"""Every program of ``examples/`` runs as its first lines say, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pages import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("decorator.py", ["--samples", "12"], "12 results, every bit as plain PyTorch"),
        pytest.param("live_source.py", ["--seconds", "1.5"], "of 360 frames", marks=pytest.mark.slow),
        pytest.param("learn_digits.py", ["--digits", "120"], "answers as plain SGD does", marks=pytest.mark.slow),
        pytest.param("learn_video.py", ["--frames", "120"], "learning.html", marks=pytest.mark.slow),
        pytest.param("own_pass.py", [], "the pipeline gives what the model gives", marks=pytest.mark.slow),
    ],
)
def test_example(name: str, words: list[str], said: str, tmp_path: Path) -> None:
    done = run(name, words, tmp_path, 150)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = run("demo_video.py", ["--frames", "20", "--rounds", "1"], tmp_path, 400)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_is_run() -> None:
    said = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in said]
    assert not missing, f"no test runs {missing}"


def run(name: str, words: list[str], folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
