"""Read a saved pipeline back, believing nothing that was not checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipecompile.artefact.allow import check_source
from pipecompile.artefact.format import (
    FORMAT,
    MANIFEST,
    OLDEST_TORCH,
    PLAN,
    PROGRAM,
    WEIGHTS,
    file_digest,
    manifest_digest,
)
from pipecompile.errors import ArtefactError
from pipecompile.ir.graph import OutputRef, StateSpec, Symbol
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, spec_from_json
from pipecompile.ir.tree import Tree


def load(
    path: str | os.PathLike[str], *, trust: bool = False, mode: Literal["infer", "train"] = "infer"
) -> tuple[Package, dict[str, torch.Tensor]]:
    """Read the folder ``path``: the package, and its state by placeholder name.

    Generated code is checked against an allow-list before anything of it runs. ``trust=True``
    also allows operators outside torch's own and the imports that register them.

    Raises:
        ArtefactError: if a file is missing, altered, of a newer format, made for a newer torch
            than this one, of another mode, or holds code that is not allowed. The message names it.
    """
    folder = Path(path)
    try:
        manifest = _manifest(folder)
        saved = manifest.get("mode", "infer")
        if saved != mode:
            raise ArtefactError(f"{folder} was saved by a pipeline of mode={saved!r}: load it with mode={saved!r}")
        _check_files(folder, manifest)
        return _package(folder, manifest, trust)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtefactError(
            f"{folder} holds entries that do not fit together ({type(error).__name__}: {error}): "
            "compile the model and save it again"
        ) from error


def _package(folder: Path, manifest: dict[str, Any], trust: bool) -> tuple[Package, dict[str, torch.Tensor]]:
    if manifest["imports"] and not trust:
        raise ArtefactError(
            f"{folder} imports {', '.join(manifest['imports'])} for custom operators: "
            "pass trust=True if you trust where it came from"
        )
    modules: list[DeviceModule] = []
    for entry in manifest["modules"]:
        file = folder / entry["file"]
        source = file.read_text()
        check_source(source, str(file), trust=trust, step=manifest.get("mode") == "train")
        modules.append(
            DeviceModule(
                entry["device"],
                tuple(entry["stages"]),
                source,
                str(file.resolve()),
                tuple(entry["state"]),
                entry["replica"],
                entry["replicas"],
            )
        )
    state_fields = StateSpec.__dataclass_fields__
    package = Package(
        manifest["model"],
        tuple(modules),
        Plan.from_json(_json(folder / PLAN)),
        Program.from_json(_json(folder / PROGRAM)),
        tuple(StateSpec(**{k: v for k, v in entry.items() if k in state_fields}) for entry in manifest["state"]),
        tuple(spec_from_json(spec) for spec in manifest["inputs"]),
        tuple(manifest["input_names"]),
        tuple(OutputRef(**ref) for ref in manifest["outputs"]),
        Tree.from_json(manifest["in_tree"]),
        Tree.from_json(manifest["out_tree"]),
        {name: _symbol(entry) for name, entry in manifest["symbols"].items()},
        tuple(manifest["parameters"]),
        tuple(manifest["imports"]),
    )
    return package, _tensors(folder / WEIGHTS, manifest["state"])


def _symbol(entry: dict[str, Any]) -> Symbol:
    also = tuple((place, dim, size) for place, dim, size in entry["also"])
    return Symbol(entry["input"], entry["dim"], entry["low"], entry["high"], also)


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ArtefactError(f"there is no saved pipeline at {folder}")
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtefactError(f"{folder} is not a saved pipeline: it has no {MANIFEST}")
    manifest = _json(file)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, int):
        raise ArtefactError(f"{file} is not the manifest of a saved pipeline")
    if found < FORMAT:
        raise ArtefactError(f"{folder} has format {found}; this version reads {FORMAT}: compile and save it again")
    if found > FORMAT:
        raise ArtefactError(
            f"{folder} has format {found}, newer than the {FORMAT} this version reads: upgrade pipecompile"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise ArtefactError(f"{file} was altered after it was saved: its digest does not match")
    made, here = _version(manifest["torch"]), _version(torch.__version__)
    if here < OLDEST_TORCH or here < made:
        need = max(OLDEST_TORCH, made)
        raise ArtefactError(
            f"{folder} needs torch {need[0]}.{need[1]} or newer, this is {torch.__version__}: upgrade torch, "
            "or compile the model again here"
        )
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    files: dict[str, str] = manifest["files"]
    needed = {PLAN, PROGRAM, WEIGHTS, *(entry["file"] for entry in manifest["modules"])}
    for name in sorted(needed | files.keys()):
        file = folder / name
        if Path(name).name != name or name not in files:
            raise ArtefactError(f"the manifest of {folder} does not account for the file {name!r}")
        if not file.is_file():
            raise ArtefactError(f"{folder} is incomplete: the file {name} is missing")
        if file_digest(file) != files[name]:
            raise ArtefactError(f"{file} was altered after it was saved: its digest does not match")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{file} cannot be read: {error}") from error


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _tensors(file: Path, state: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    try:
        storages = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{file} cannot be read: {error}") from error
    # Storages of their own: safetensors maps one file for all, at any alignment.
    storages = {name: flat.clone().untyped_storage() for name, flat in storages.items()}
    tensors: dict[str, torch.Tensor] = {}
    for entry in state:
        empty = torch.empty(0, dtype=getattr(torch, entry["dtype"]))
        tensors[entry["name"]] = empty.set_(
            storages[entry["storage"]], entry["offset"], entry["shape"], entry["stride"]
        )
    return tensors
