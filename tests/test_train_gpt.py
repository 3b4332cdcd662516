"""The example trains a real GPT-2 on a real text, with the curve of plain PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_examples import EXAMPLES, run

TINY = ["--layers", "2", "--width", "32", "--schedule", "1f1b"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[*TINY, "--steps", "12"], ["--steps", "120", "--schedule", "zb_v"]], ids=str)
def test_a_gpt_is_trained_and_the_curve_is_that_of_eager(words: list[str], tmp_path: Path) -> None:
    done = run("train_gpt.py", words, tmp_path, 400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"curves +at most (\S+) apart in (\d+) steps, from (\S+) to (\S+)", done.stdout)
    assert found is not None, done.stdout
    apart, steps, first, last = map(float, found.groups())
    assert apart < (1e-5 if steps == 12 else 1e-2)
    assert last < first - 0.1
    if steps > 100:  # long enough to know more than how frequent each character is
        blind = re.search(r"blind +a loss of ([\d.]+)", done.stdout)
        assert blind is not None
        assert last < float(blind[1])
    assert "\x1b" not in done.stdout  # quiet in a pipe: no progress bar
    page = (EXAMPLES.parent / "build" / "train_gpt" / "loss.html").read_text()
    assert "plain PyTorch" in page
    assert "pipeline" in page
