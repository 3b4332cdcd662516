"""The generated text: readable, complete, and allowed by the loader's own rules."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import nn

import pipecompile
from models import CASES, CORE, Case
from pipecompile.artefact.allow import check_source


def sources(case: Case, devices: int = 2) -> list[str]:
    model, calls = case.make()
    args, kwargs = calls[0]
    with pipecompile.compile(model, args, kwargs, devices=devices, executor="inline", profile_seconds=0.05) as pipe:
        return [module.source for module in pipe.package.modules]


@pytest.mark.parametrize("case", CORE[::4], ids=str)
def test_generated_code_passes_the_loader_s_allow_list(case: Case) -> None:
    for source in sources(case, 1):
        check_source(source, "device_0.py")


def test_a_module_reads_as_stage_and_schedule() -> None:
    first, second = sources(CASES["mlp"])
    for source in (first, second):
        tree = ast.parse(source)
        assert ast.get_docstring(tree)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions][-1] == "run"
        assert all(ast.get_docstring(node) for node in functions if node.name == "run" or node.name.startswith("stage"))
        text = ast.unparse(functions[-1])
        for part in ("link.receiver", "link.sender", ".post(", ".put(", ".end()"):
            assert part in text
        assert max(map(len, source.splitlines())) < 200
    assert "def stage_0(" in first
    assert "def stage_1(" in second


def test_comments_name_layers_and_source_lines() -> None:
    (source,) = sources(CASES["mlp"], 1)
    comments = [line.strip() for line in source.splitlines() if line.strip().startswith("# ")]
    assert any("structure.py:" in line or ".py:" in line for line in comments)


class Awkward(nn.Module):
    """Names and constants that Python or the generated module use themselves."""

    def forward(self, torch_: torch.Tensor, *, link: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        lowest = torch.full((3,), -float("inf"))
        nothing = torch.full((3,), float("nan")).nan_to_num(1.0)
        return torch.maximum(torch_, lowest) + link * nothing + count.to(torch.float64).to(torch.float32)


def test_awkward_names_and_constants() -> None:
    args, kwargs = (torch.randn(3),), {"link": torch.randn(3), "count": torch.arange(3)}
    model = Awkward().eval()
    with pipecompile.compile(model, args, kwargs, devices=1, executor="inline", profile_seconds=0.05) as pipe:
        assert torch.equal(pipe(*args, **kwargs), model(*args, **kwargs))
        check_source(pipe.package.modules[0].source, "device_0.py")
