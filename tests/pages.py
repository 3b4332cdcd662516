"""Pages of the manual as programs: their fenced blocks, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^( *)(`{3,})(\w*) *(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line`` is that of its first line of text, from 1; ``title`` names a file."""

    language: str
    title: str
    text: str
    line: int
    run: bool


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page. One with ``<!-- not run: the reason -->`` before it is not to be run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        at += 1
        if opening is None:
            continue
        indent, ticks, language, rest = opening.groups()
        first, before = at, next((line for line in reversed(lines[: at - 1]) if line.strip()), "")
        while lines[at].strip() != ticks:
            at += 1
        title = _TITLE.search(rest)
        text = "\n".join(line.removeprefix(indent) for line in lines[first:at]) + "\n"
        yield Block(language, title[1] if title else "", text, first + 1, not _NOT_RUN.fullmatch(before.strip()))
        at += 1


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The ``$`` lines of a console block, each with the lines of output shown below it."""
    command, shown = "", list[str]()
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    if command:
        yield command, shown
