"""The manual, run: every Python block and every ``pipecompile`` command of it, page by page.

The blocks of a page share a namespace and a folder. A block with a title is written to the file of
that name. Of what a page shows as output, only what cannot differ from run to run is compared.
"""

from __future__ import annotations

import io
import linecache
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from commands import in_process
from media import write_video
from pages import DOCS, ROOT, Block, blocks, commands
from pipecompile import driver
from pipecompile.pipelines.infer_driver import compile_inference
from pipecompile.pipelines.learn_driver import compile_learning
from pipecompile.pipelines.train_driver import compile_training

PAGES = [
    DOCS / "tutorial.md",
    *sorted((DOCS / "howto").glob("*.md")),
]
#: Pages whose point is a process of its own for each device; elsewhere one process is quicker.
IN_PROCESSES = ("tutorial", "survival")
#: Pages that take more than ten seconds, but for the tutorial: `make verify` runs them.
LONG = ("command", "survival")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(compile_inference.__kwdefaults__, "profile_seconds", 0.3)
    if page.stem not in IN_PROCESSES:
        monkeypatch.setitem(compile_inference.__kwdefaults__, "executor", "inline")
        monkeypatch.setitem(driver.load.__kwdefaults__, "executor", "inline")
    write_video(tmp_path / "clip.mp4", 12)
    known = set(sys.modules)
    names: dict[str, Any] = {"__name__": "page"}
    said = ""
    ran = 0
    try:
        for block in blocks(page):
            if not block.run:
                continue
            if block.title and block.language in ("python", "yaml"):
                (tmp_path / block.title).write_text(block.text)
            elif block.language == "python":
                said, ran = run_python(block, page, names), ran + 1
            elif block.language == "text":
                assert masked(block.text) == masked(said), f"{page.name}:{block.line} shows what is not printed"
            elif block.language == "console":
                for words, shown in commands(block):
                    ran += run_command(words, shown, f"{page.name}:{block.line}", tmp_path, monkeypatch, capsys)
    finally:
        for pipe in [value for value in names.values() if isinstance(value, pipecompile.InferencePipeline)]:
            pipe.close()
        for name in set(sys.modules) - known:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]
    assert ran, f"{page.name} has nothing to run"


class Net(nn.Module):
    """What the pages on modes and on the planner call ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.encoder(self.embed(x))))


def given(page: str, text: str) -> dict[str, Any]:
    """The names that a block takes from its reader: a model, data, a loss, a pipeline that trains."""
    model, criterion, batch = Net(), nn.CrossEntropyLoss(), 1 if page == "learning" else 8
    pairs = [(torch.randn(batch, 8), torch.arange(batch) % 4) for _ in range(3)]
    names = {
        "__name__": "page", "pipecompile": pipecompile, "torch": torch, "model": model, "x": pairs[0][0],
        "loader": pairs, "samples": pairs, "inputs": pairs[0][0], "targets": pairs[0][1],
        "criterion": criterion, "loss_fn": criterion,
    }  # fmt: skip
    if "pipe." in text and "pipe =" not in text:
        names["pipe"] = pipecompile.compile(
            model, pairs[0][0], mode="train", loss_fn=criterion, optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule="gpipe",
        )  # fmt: skip
    return names


@pytest.mark.parametrize(
    "page", [DOCS / f"{name}.md" for name in ("training", "learning", "planner")], ids=lambda p: p.stem
)
def test_blocks_of_a_page_of_reference_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself: they take names from their reader. What is trained has changed afterwards."""
    monkeypatch.chdir(tmp_path)
    for compiler, seconds in ((compile_inference, 0.1), (compile_training, 0.02), (compile_learning, 0.02)):
        monkeypatch.setitem(compiler.__kwdefaults__, "profile_seconds", seconds)
        monkeypatch.setitem(compiler.__kwdefaults__, "executor", "inline")
    ran = 0
    for block in blocks(page):
        if block.language == "python" and block.run:
            names = given(page.stem, block.text)
            before = {name: value.clone() for name, value in names["model"].state_dict().items()}
            run_python(block, page, names)
            pipe = names.get("pipe")
            if isinstance(pipe, nn.Module) and not isinstance(pipe, pipecompile.InferencePipeline):
                after = names["model"].state_dict()
                assert not any(torch.equal(after[name], value) for name, value in before.items()), "nothing was trained"
            if pipe is not None:
                pipe.close()
            ran += 1
        elif block.language == "yaml":
            (tmp_path / "cluster.yaml").write_text(block.text)
            assert pipecompile.Cluster.load("cluster.yaml").devices
            ran += 1
    assert ran


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    """Run a block with the line numbers of its page; what it prints."""
    out = io.StringIO()
    text = page.read_text(encoding="utf-8")
    # Errors quote the line they come from, by a name that is the same wherever the repository lies.
    linecache.cache[page.name] = (len(text), None, text.splitlines(keepends=True), page.name)
    code = compile("\n" * (block.line - 1) + block.text, page.name, "exec", dont_inherit=True)
    with redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def run_command(
    line: str,
    shown: list[str],
    where: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> int:
    """Run a command of ours; 1 if it was one. Lines shown without a number in them must have been printed."""
    program, *words = shlex.split(line, comments=True)
    if program != "pipecompile":
        return 0
    status, out, err = in_process(folder, words, monkeypatch, capsys)
    assert status == 0, f"{where}: {line}\n{err}"
    printed = [masked(text) for text in (out + err).splitlines()]
    for text in shown:
        if not re.search(r"\d|\.\.\.", text):
            assert masked(text) in printed, f"{where}: {text!r} is not in what {line!r} prints:\n{out}"
    return 1


def masked(text: str) -> str:
    """Without numbers and frames of tables, spaces made one: what stays the same from run to run."""
    text = re.sub(r"[─-╿]", " ", text)
    return " ".join(re.sub(r"[\d.,]+", "#", text).split())


def test_a_masked_text_keeps_its_words() -> None:
    assert masked("┃ stage ┃ 3.5 ms\n") == masked("| stage 12,5  ms".replace("|", "│"))
    assert masked("stage 3") != masked("device 3")


def test_the_blocks_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'Text\n\n```python title="a.py"\nx = 1\n```\n\n'
        "<!-- not run: a reason -->\n```console\n$ a\nb\n$ c\n```\n\n- item\n\n    ```text\n    y\n    ```\n"
    )
    first, second, third = blocks(page)
    assert (first.language, first.title, first.text, first.line, first.run) == ("python", "a.py", "x = 1\n", 4, True)
    assert not second.run
    assert list(commands(second)) == [("a", ["b"]), ("c", [])]
    assert third.text == "y\n"


def test_every_public_name_is_in_the_reference() -> None:
    said = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: pipecompile\.(\S+)", said, re.MULTILINE))
    names = {name.rpartition(".")[2] for name in documented}
    public = {*pipecompile.__all__, *pipecompile.sources.__all__, *pipecompile.losses.__all__}
    missing = public - names - {"__version__", "sources", "losses"}
    assert not missing, f"docs/reference says nothing of {sorted(missing)}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
