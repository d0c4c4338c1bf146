"""Patches: what makes one task's vector of a shared one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calmerge._measure import Measure, total
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Computed, Gathered, Site, Spec, Weights
from calmerge.pieces.mask import packed, unpacked

_PREFIX = "mask/"


@dataclass(frozen=True)
class MaskPatch:
    """The shared vector where a mask is on, times a number: one bit an entry, and four bytes.

    Attributes:
        mask: boolean, of the shared vector's names and shapes.
        scale: the number; without one the shared vector is taken as it is.

    >>> from calmerge import StateDict
    >>> patch = MaskPatch(StateDict({"w": torch.tensor([True, False])}))
    >>> patch.apply(StateDict({"w": torch.tensor([3.0, 4.0])}))["w"]
    tensor([3., 0.])
    """

    mask: Weights
    scale: Measure | None = None
    kind: str = "mask"

    @property
    def stored(self) -> Weights:
        """The mask with eight entries in a byte, and the number."""
        bits = packed(self.mask)
        parts: dict[str, tuple[Weights, str]] = {_PREFIX + name: (bits, name) for name in bits.specs}
        if self.scale is not None:
            number = Computed(lambda scale, site: scale.float(), (self.scale,), {"scale": Spec((), torch.float32)})
            parts["scale"] = (number, "scale")
        return Gathered(parts)

    def apply(self, shared: Weights) -> Weights:
        """The shared vector where the mask is on, times the number."""
        if self.scale is None:
            return shared.map(lambda v, on, site: v.where(on, 0.0), self.mask)
        return shared.map(lambda v, on, scale, site: v.where(on, 0.0) * scale.float(), self.mask, self.scale)

    @classmethod
    def restore(cls, stored: Weights, shared: Weights) -> "MaskPatch":
        """The patch of a file, with masks of the shared vector's shapes."""
        bits = Gathered({name: (stored, _PREFIX + name) for name in shared.specs})
        scale = total(stored.only_names(["scale"]), lambda number: number) if "scale" in stored.specs else None
        return cls(unpacked(bits, shared.specs), scale)


def mask_patches(masks: TaskVectors, scales: Measure | None = None) -> Mapping[str, MaskPatch]:
    """By task, the patch of its mask in [T, ...] and of its number in [T].

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, 0.0])}})
    >>> mask_patches(tvs.transform(lambda tau, site: tau != 0))["a"].mask["w"]
    tensor([ True, False])
    """
    return {
        task: MaskPatch(_one_mask(masks, task), None if scales is None else _one_number(scales, t))
        for t, task in enumerate(masks.tasks)
    }


def _one_mask(masks: TaskVectors, task: str) -> Weights:
    t = masks.tasks.index(task)

    def one(stack: Tensor, site: Site) -> Tensor:
        return stack[t]

    return Computed(one, (masks,), {name: Spec(spec.shape, torch.bool) for name, spec in masks.specs.items()})


def _one_number(numbers: Measure, t: int) -> Measure:
    return numbers.map(lambda found: found[t])
