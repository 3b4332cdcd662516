"""The version, as installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pipecompile")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.1.0"
