"""Saved pipelines: a folder of readable files that loads without pickle or the model's source."""

from pipecompile.artefact.load import load
from pipecompile.artefact.save import save

__all__ = ["load", "save"]
