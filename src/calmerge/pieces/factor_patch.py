"""Patches of low rank: what a task's vector has beyond the shared one, as thin factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Computed, Gathered, Site, Spec, Weights
from calmerge.pieces.matrices import check_patterns, is_matrix
from calmerge.pieces.spectral import svd

LEFT, RIGHT, WHOLE = "left/", "right/", "whole/"


@dataclass(frozen=True)
class FactorPatch:
    """What is added to the shared vector: matrices as left right^T, other tensors whole, tensors it lacks not at all.

    A shared vector that lacks a tensor counts as zero there.

    Attributes:
        stored: left/NAME [m, k] and right/NAME [n, k] of matrices, whole/NAME of other tensors.

    >>> from calmerge import StateDict
    >>> stored = StateDict({"left/w": torch.tensor([[1.0], [2.0]]), "right/w": torch.tensor([[3.0]])})
    >>> FactorPatch(stored).apply(StateDict({}))["w"]
    tensor([[3.],
            [6.]])
    >>> FactorPatch(stored).apply(StateDict({"w": torch.ones(2, 1)}))["w"]
    tensor([[4.],
            [7.]])
    """

    stored: Weights
    kind: str = "factors"

    def apply(self, shared: Weights) -> Weights:
        """The task's vector."""
        own = self.own()
        both = [n for n in own if n in shared.specs]
        total = shared.only_names(both).map(lambda s, v, site: s + v, own)
        parts = {n: (shared, n) for n in shared} | {n: (own, n) for n in own}
        return Gathered(parts | {n: (total, n) for n in both})

    def own(self) -> Weights:
        """What is added."""
        left, right, whole = (self.under(prefix) for prefix in (LEFT, RIGHT, WHOLE))
        shapes = {n: (left.specs[n].shape[0], right.specs[n].shape[0]) for n in left}
        specs = {n: Spec(shape, torch.float32) for n, shape in shapes.items()}
        product = Computed(lambda u, v, site: u @ v.T, (left, right), specs, elementwise=False)
        return Gathered({n: (product, n) for n in product} | {n: (whole, n) for n in whole})

    @classmethod
    def restore(cls, stored: Weights, shared: Weights) -> "FactorPatch":
        """The patch of a file."""
        return cls(stored)

    def under(self, prefix: str) -> Weights:
        """The stored tensors of one kind, by the name of the tensor they make."""
        return Gathered({n.removeprefix(prefix): (self.stored, n) for n in self.stored if n.startswith(prefix)})


def factor_patches(tvs: TaskVectors, keep: float, skip: Sequence[str]) -> dict[str, FactorPatch]:
    """By task, its vector with matrices cut to max(1, floor(keep r)) singular triples, r = min(m, n).

    A matrix whose factors would be no smaller than itself stays whole, as all other tensors do.

    >>> tvs = task_vectors({"w": torch.zeros(9, 9)}, {"a": {"w": torch.ones(9, 9)}})
    >>> {name: spec.shape for name, spec in factor_patches(tvs, 0.2, [])["a"].stored.specs.items()}
    {'left/w': (9, 1), 'right/w': (9, 1)}
    """
    check_patterns(tvs, skip)
    ranks = {}
    for name, spec in tvs.specs.items():
        if is_matrix(name, len(spec.shape), skip) and spec.numel:
            k = max(1, int(keep * min(spec.shape)))
            if k * sum(spec.shape) < spec.numel:
                ranks[name] = k
    return patches_of_ranks(tvs, ranks)


def patches_of_ranks(tvs: TaskVectors, ranks: Mapping[str, int]) -> dict[str, FactorPatch]:
    """By task, its vector with some matrices cut to a number of singular triples, and all other tensors whole.

    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": torch.ones(2, 2)}})
    >>> patches_of_ranks(tvs, {"w": 1})["a"].own()["w"].round()
    tensor([[1., 1.],
            [1., 1.]])
    """
    return {task: _patch(tvs.of(task), ranks) for task in tvs.tasks}


def _patch(vector: Weights, ranks: Mapping[str, int]) -> FactorPatch:
    def side(i: int) -> Weights:
        def factor(delta: Tensor, site: Site) -> Tensor:  # each decomposes anew: nothing is kept between two tensors
            u, s, v = svd(delta, ranks[site.name])
            return pad((v if i else u) * s.sqrt(), (0, ranks[site.name] - len(s))).float()

        specs = {n: Spec((vector.specs[n].shape[i], k), torch.float32) for n, k in ranks.items()}
        return Computed(factor, (vector,), specs, elementwise=False, copies=20)

    parts: dict[str, tuple[Weights, str]] = {WHOLE + n: (vector, n) for n in vector if n not in ranks}
    for prefix, factors in ((LEFT, side(0)), (RIGHT, side(1))):
        parts |= {prefix + n: (factors, n) for n in ranks}
    return FactorPatch(Gathered(parts))
