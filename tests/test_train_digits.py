"""The example trains what it says, with the curve of plain PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_digits.py"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "zb_v"])
def test_digits_are_learned_and_the_curve_is_that_of_eager(schedule: str) -> None:
    command = [sys.executable, str(EXAMPLE), "--schedule", schedule]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"pipeline .* test accuracy ([\d.]+)%", done.stdout)
    assert found is not None
    assert float(found[1]) >= 97
    assert "\x1b" not in done.stdout  # quiet in a pipe: no progress bar
    assert (EXAMPLE.parent.parent / "build" / "digits" / "loss.svg").read_text().count("<polyline") == 2
