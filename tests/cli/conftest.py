"""A working directory with models in it, and the command run there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from commands import MODEL, in_process

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module of models in it."""
    (tmp_path / "nets.py").write_text(MODEL)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("compile", ...)``: exit status, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        return in_process(folder, list(words), monkeypatch, capsys)

    return call
