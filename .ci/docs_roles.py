"""mkdocs hook: docstrings name things in Sphinx's way (:class:`~a.b.C`), pages show `C`."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """The page without the names of roles, and with the short names that ``~`` asks for."""
    return _ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
