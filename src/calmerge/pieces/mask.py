"""Binary masks: where the largest entries are, and one bit for each entry on disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calmerge._errors import CheckpointError
from calmerge._measure import kth_magnitude
from calmerge._watch import other_rows
from calmerge._weights import ALL, Memo, Spec, Weights, row_size


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """The entries of a finite tensor where the mask is true, and 0 elsewhere.

    A product with bytes: to choose by booleans takes torch four times as long.

    >>> masked(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return tensor * mask.view(torch.uint8)


def top_fraction(weights: Weights, fraction: float) -> float:
    """The magnitude that only the largest entries of the model exceed: its k-th largest |w|, k = floor(fraction * N).

    Entries strictly above it are k - 1 where magnitudes are distinct. With k = 0 (fraction * N < 1) it is infinite, and
    no entry exceeds it.

    Args:
        weights: float tensors, counted all together.
        fraction: share of the N entries, in [0, 1].

    >>> from calmerge import StateDict
    >>> top_fraction(StateDict({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0, 2.0])}), 0.5)
    3.0
    """
    n = weights.numel
    k = int(fraction * n)
    return float(kth_magnitude(weights, n - k + 1).value()[0]) if k else float("inf")


def pack(mask: Tensor) -> Tensor:
    """A boolean mask as bytes, eight entries in each, first entry in the highest bit.

    >>> pack(torch.tensor([[True, False], [True, True]]))
    tensor([176], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of `shape` that `pack` made bytes of.

    >>> unpack(torch.tensor([176], dtype=torch.uint8), (2, 2))
    tensor([[ True, False],
            [ True,  True]])
    """
    n = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n).astype(bool)).reshape(shape)


def packed(masks: Weights) -> Weights:
    """Boolean masks as bytes that are made when they are read, `ceil(n / 8)` of them for a mask of n entries.

    >>> from calmerge import StateDict
    >>> packed(StateDict({"w": torch.ones(3, 3, dtype=torch.bool)}))["w"]
    tensor([255, 128], dtype=torch.uint8)
    """
    return _Packed(masks)


def unpacked(bits: Weights, specs: Mapping[str, Spec]) -> Weights:
    """The masks that `packed` made bytes of, in the shapes of `specs`, unpacked when they are read.

    >>> from calmerge import StateDict
    >>> mask = StateDict({"w": torch.tensor([True, False, True])})
    >>> unpacked(packed(mask), mask.specs)["w"]
    tensor([ True, False,  True])
    """
    return _Unpacked(bits, specs)


class _Packed(Weights):
    def __init__(self, masks: Weights) -> None:
        self._masks = masks
        self.inputs = (masks,)
        self.specs = {name: Spec((-(-spec.numel // 8),), torch.uint8) for name, spec in masks.specs.items()}
        self.elementwise = masks.elementwise

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        spec = self._masks.specs[name]
        if rows == ALL or not spec.shape:
            return pack(self._masks.read(name, ALL, memo))
        other_rows()
        row = max(1, row_size(spec))
        first, last = 8 * (rows.start or 0), min(8 * rows.stop, spec.numel)
        start = first // row
        around = self._masks.read(name, slice(start, -(-last // row)), memo)
        return pack(around.reshape(-1)[first - start * row : last - start * row])


class _Unpacked(Weights):
    def __init__(self, bits: Weights, specs: Mapping[str, Spec]) -> None:
        self._bits = bits
        self.inputs = (bits,)
        self.specs = {name: Spec(spec.shape, torch.bool) for name, spec in specs.items()}
        self.elementwise = bits.elementwise

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        spec = self.specs[name]
        if rows == ALL:
            return unpack(self._bits.read(name, ALL, memo), spec.shape)
        other_rows()
        first, last = (rows.start or 0) * row_size(spec), rows.stop * row_size(spec)
        start = first // 8
        around = unpack(self._bits.read(name, slice(start, -(-last // 8)), memo), (last - 8 * start,))
        return around[first - 8 * start :].reshape(-1, *spec.shape[1:])


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """One safetensors file with every mask at one bit an entry; shapes stand in its metadata."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    save_file({name: pack(mask) for name, mask in masks.items()}, path, metadata={"shapes": json.dumps(shapes)})


def load_masks(path: Path) -> dict[str, Tensor]:
    """The boolean masks that `save_masks` wrote.

    Raises:
        CheckpointError: the file is none of these.
    """
    try:
        with safe_open(path, framework="pt") as f:
            shapes = json.loads(f.metadata()["shapes"])
            return {name: unpack(f.get_tensor(name), tuple(shape)) for name, shape in shapes.items()}
    except Exception as e:
        raise CheckpointError(f"{path}: no file of packed masks ({e}).") from None
