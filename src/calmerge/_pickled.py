"""Files of `torch.save`: where their tensors lie, so that they are read like any other, or what they hold."""

import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import CheckpointError
from calmerge._header import Entry

SUFFIXES = (".pt", ".pth", ".bin")


def pickled_entries(file: Path, names: Mapping[torch.dtype, str]) -> dict[str, Entry] | None:
    """Where the tensors of a state dict lie in its file.

    None where that cannot be told: in the format before torch 1.6, or where one is no plain tensor in row-major order.
    Nothing but the pickle, which holds no data, is read, by torch's loader of weights alone.

    Args:
        file: what `torch.save` has written.
        names: safetensors' names of types.
    """
    try:
        if not _as_in_memory(file):
            return None
        loaded = _state_dict(torch.load(file, map_location="meta", weights_only=True))
    except Exception:  # loading it will tell
        return None
    size, found = file.stat().st_size, {}
    for name, tensor in loaded.items() if isinstance(loaded, dict) else ():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in names:
            return None
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return None
        storage = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if storage is None:
            return None
        start = storage + tensor.storage_offset() * tensor.itemsize
        stop = start + tensor.numel() * tensor.itemsize
        if stop > min(size, storage + tensor.untyped_storage().nbytes()):
            return None
        found[name] = Entry(names[tensor.dtype], tuple(tensor.shape), start, stop)
    return found or None


def _as_in_memory(file: Path) -> bool:
    """Whether storages lie in the file as they do in memory: not packed, and in this processor's order of bytes."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        order = [name for name in archive.namelist() if name.rpartition("/")[2] == "byteorder"]
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        return stored and all(archive.read(name).decode() == sys.byteorder for name in order)


def load_pickled(file: Path) -> dict[str, Any]:
    """What a pickle of plain tensors holds; one that asks for anything else is refused, not run.

    Raises:
        CheckpointError: it is refused, broken, or no mapping.
    """
    try:
        loaded = _state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:
        raise CheckpointError(
            f"{file}: cannot be loaded as plain tensors ({(str(e).splitlines() or [type(e).__name__])[0]}). "
            "Pickles that run code are refused; save the state dict as safetensors."
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, expected a mapping of tensors.")
    return loaded


def _state_dict(loaded: Any) -> Any:
    """What a trainer has put beside other things."""
    return loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
