"""What MODEL means: a checkpoint folder, a config.json, a built-in shape, or a hub id in the local cache."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hwmodels.errors import CheckpointError, ModelError
from sim import shapes
from sim.model import ModelSpec, load_model

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(text: str | Path, dtype: str = "auto") -> ModelSpec:
    """Sizes of the model that a text names; reads no weights. ModelError says what was looked for."""
    path = Path(text).expanduser()
    if path.exists():
        return load_model(path, dtype)
    name = str(text)
    if name in shapes.names():
        return shapes.shape(name, dtype)
    config = _cached_config(name) if _HUB_ID.fullmatch(name) else None
    if config is None:
        raise ModelError(f"{_not_found(name)}; {shapes.unknown(name)}")
    return replace(load_model(config, dtype), name=name)


def resolve_folder(text: str | Path) -> Path:
    """The checkpoint folder that a text names; CheckpointError says what was looked for."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    name = str(text)
    folder = _cached_folder(name) if _HUB_ID.fullmatch(name) else None
    if folder is None:
        raise CheckpointError(_not_found(name))
    return folder


def check_checkpoint(folder: Path) -> None:
    """Raise ModelError or CheckpointError if a folder cannot be run: its family, its files, their headers."""
    from runtime.adapter import Adapter
    from runtime.checkpoint import Checkpoint, read_config

    Adapter.of(read_config(folder), folder.name)
    Checkpoint.open(folder).close()


def _not_found(name: str) -> str:
    tried = f"no model {name!r}: there is no such file or folder"
    if _HUB_ID.fullmatch(name):
        tried += f", and the local Hugging Face cache does not hold it; fetch it with: hf download {name}"
    return tried


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _cached_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
