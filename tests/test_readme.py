"""The README shows generated code: it must be what is generated."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import pipecompile

README = Path(__file__).parents[1] / "README.md"


def test_generated_code_shown_is_what_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    model = next(block for block in blocks if block.startswith("class Net(nn.Module)"))
    shown = next(block for block in blocks if "def stage_0" in block)
    (tmp_path / "net.py").write_text(f"from torch import nn\n\n\n{model}")
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("net").Net().eval()
    with pipecompile.compile(
        net, torch.randn(1, 8), ahead=1, pin={"first": "cpu:0", "relu": "cpu:0", "second": "cpu:1"}, executor="inline",
        use_cache=False, profile_seconds=0.05,
    ) as pipe:  # fmt: skip
        source = pipe.package.modules[0].source
    assert source[source.index("def stage_0") :].strip() == shown.strip()
