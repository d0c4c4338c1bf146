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
from calmerge._weights import Weights


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
