"""Putting sparse task vectors together: where several tasks want an entry, their values are averaged."""

from collections.abc import Mapping

import torch
from torch import Tensor

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import summed
from calmerge.pieces.mask import unpack


def stitch(tvs: TaskVectors, masks: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    """One delta from the masked task vectors: sum_t gamma_t tau_t / max(1, sum_j gamma_j), elementwise.

    Args:
        tvs: task vectors.
        masks: by task and tensor, packed masks (see `pack`); a tensor without one is left as the base has it.

    >>> from calmerge.pieces.mask import pack
    >>> experts = {"a": {"w": torch.tensor([3.0, 2.0])}, "b": {"w": torch.tensor([6.0, 7.0])}}
    >>> tvs = task_vectors({"w": torch.zeros(2)}, experts)
    >>> both, first = pack(torch.tensor([True, True])), pack(torch.tensor([True, False]))
    >>> stitch(tvs, {"a": {"w": both}, "b": {"w": first}})["w"]
    tensor([4.5000, 2.0000])
    """

    def averaged(tau: Tensor, site: Site) -> Tensor:
        shape = tvs.specs[site.name].shape
        nothing = torch.zeros(shape, dtype=torch.bool)
        found = [masks[task].get(site.name) for task in tvs.tasks]
        gamma = torch.stack([nothing if bits is None else unpack(bits, shape) for bits in found]).to(tau.device)
        return summed(tau.where(gamma, 0.0)) / gamma.sum(0).clamp(min=1)

    return tvs.reduce(averaged, elementwise=False)
