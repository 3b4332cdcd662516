"""Running the command: in a process of its own, as a user does, or here, without the seconds torch takes to import."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

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
        torch.manual_seed(6)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Bare(nn.Module):
    def forward(self, x):
        return x.tanh()


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.head = nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return {"scores": self.head(self.embed(ids)), "twice": (ids * 2,)}


instance = nn.Linear(2, 2)
number = 3


def needs(argument):
    return argument


def breaks():
    raise RuntimeError("no weights here")


def wrong():
    return "no model"
"""


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
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "argv", ["pipecompile", *words])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout
