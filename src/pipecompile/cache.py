"""Profiles kept on disk by the fingerprint of what they measured."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from pipecompile.ir.profile import Profile

_log = logging.getLogger("pipecompile")


def directory() -> Path:
    """``$PIPECOMPILE_CACHE``, else ``pipecompile`` in the user's cache directory."""
    given = os.environ.get("PIPECOMPILE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipecompile"


def load(digest: str) -> Profile | None:
    """The profile stored under ``digest``; None if there is none that can be read."""
    path = directory() / f"profile-{digest[:32]}.json"
    try:
        profile = Profile.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("ignoring the unreadable cached profile %s: %s", path, error)
        return None
    return profile if profile.digest == digest else None


def store(profile: Profile) -> None:
    """Write a profile under its digest, whole or not at all. A failure is logged: it costs only time."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(profile.to_json(), file)
        Path(file.name).replace(folder / f"profile-{profile.digest[:32]}.json")
    except OSError as error:
        _log.warning("the profile could not be cached in %s: %s", folder, error)
