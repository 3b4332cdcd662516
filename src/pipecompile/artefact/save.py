"""Write a compiled pipeline to a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipecompile.artefact.format import FORMAT, MANIFEST, PLAN, PROGRAM, WEIGHTS, file_digest, manifest_digest
from pipecompile.errors import ArtefactError
from pipecompile.ir.package import Package


def save(
    package: Package,
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    version: str,
    *,
    mode: Literal["infer", "train"] = "infer",
    more: Callable[[Path], object] | None = None,
) -> Path:
    """Write ``package`` and its state ``tensors`` (by placeholder name) to the folder ``path``.

    ``more`` is called with the folder to write files of its own there.

    The folder appears whole or not at all; an older saved pipeline of that name is replaced.

    Raises:
        ArtefactError: if ``path`` is something else than a saved pipeline, or cannot be written.
    """
    target = Path(path)
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ArtefactError(f"{target} exists and is not a saved pipeline: choose another name or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtefactError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        if more is not None:
            more(folder)
        _write(package, tensors, folder, version, mode)
        folder.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.replace(old)
            folder.replace(target)
            shutil.rmtree(old)
        else:
            folder.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtefactError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _write(package: Package, tensors: Mapping[str, torch.Tensor], folder: Path, version: str, mode: str) -> None:
    (folder / PLAN).write_text(json.dumps(package.plan.to_json(), indent=1))
    (folder / PROGRAM).write_text(json.dumps(package.program.to_json(), indent=1))
    for module in package.modules:
        (folder / Path(module.filename).name).write_text(module.source)
    storages, layout = _storages(tensors)
    save_file(storages, folder / WEIGHTS)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "mode": mode,
        "pipecompile": version,
        "torch": torch.__version__,
        "model": package.model,
        "modules": [
            {
                "device": m.device,
                "stages": list(m.stages),
                "file": Path(m.filename).name,
                "state": list(m.state),
                "replica": m.replica,
                "replicas": m.replicas,
            }
            for m in package.modules
        ],
        "state": [{**vars(entry), **layout[entry.name]} for entry in package.state],
        "inputs": [vars(spec) for spec in package.inputs],
        "input_names": list(package.input_names),
        "outputs": [vars(ref) for ref in package.outputs],
        "in_tree": package.in_tree.to_json(),
        "out_tree": package.out_tree.to_json(),
        "symbols": {name: vars(symbol) for name, symbol in package.symbols.items()},
        "parameters": list(package.parameters),
        "imports": list(package.imports),
        "files": {file.name: file_digest(file) for file in sorted(folder.iterdir())},
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _storages(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Each distinct storage once, as bytes, and how every tensor lies in its storage.

    safetensors keeps neither strides nor sharing, so the manifest does.
    """
    storages: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    layout: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or id(storage)
        if key not in names:
            names[key] = f"storage_{len(names)}"
            flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            storages[names[key]] = flat.detach().clone()
        layout[name] = {
            "storage": names[key],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }
    return storages, layout
