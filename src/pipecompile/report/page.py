"""What every report page shares: its looks, its template environment, and how it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipecompile._version import __version__
from pipecompile.errors import InputError
from pipecompile.report import units
from pipecompile.report.summary import spans


def render(template: str, **values: Any) -> str:
    """One self-contained HTML page: no network, no script."""
    environment = Environment(
        loader=PackageLoader("pipecompile.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(time=units.time, nbytes=units.nbytes, share=units.share, spans=spans)
    return environment.get_template(template).render(version=__version__, **values)


def write_page(path: str | os.PathLike[str], page: str) -> Path:
    """Write a page to a file.

    Raises:
        InputError: if it cannot be written.
    """
    target = Path(path)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    return target


__all__ = ["render", "write_page"]
