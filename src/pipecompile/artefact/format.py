"""What the files of a saved pipeline are called and which format version this is.

``manifest.json`` names every other file with its SHA-256, and ends in a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

#: Raised when a reader of an older version could misread a newer file.
FORMAT = 3

MANIFEST, PLAN, PROGRAM, WEIGHTS = "manifest.json", "plan.json", "program.json", "weights.safetensors"

#: The oldest torch whose operators saved pipelines rely on.
OLDEST_TORCH = (2, 11)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own ``digest`` entry."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
