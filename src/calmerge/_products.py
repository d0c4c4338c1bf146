"""Factors of single tensors, kept on disk while a run may still be stopped."""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from calmerge._folder import Journal
from calmerge._hash import hash_of
from calmerge._weights import digest
from calmerge.pieces.factorise import Product

_NUMBERS = ("norm", "error", "energy")


class Products:
    """What `factorise` made of each tensor, made once, however often a run is stopped.

    Args:
        folder: where they are kept, inside of the journal's.
        journal: which of them are whole.
    """

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        folder.mkdir(exist_ok=True)

    def of(self, name: str, make: Callable[[], Product]) -> Product:
        """The factors of a tensor, read if they are there."""
        file = self._folder / f"{digest(name)}.safetensors"
        if file.is_file() and self._journal.finished.get(self._journal.name(file)) == hash_of(file):
            with safe_open(file, framework="pt") as f:
                numbers = {key: float(f.metadata()[key]) for key in _NUMBERS}
                return Product(f.get_tensor("left"), f.get_tensor("right"), **numbers)
        found = make()
        told = {key: repr(getattr(found, key)) for key in _NUMBERS}
        save_file({"left": found.left.contiguous(), "right": found.right.contiguous()}, file, metadata=told)
        self._journal.finish(file, hash_of(file))
        return found

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self._folder)
