"""The combination types of PEFT's `add_weighted_adapter`, for results that agree with it."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._random import uniform
from calmerge._signature import Count, KeepFraction, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import ALL, Memo, Spec, Weights
from calmerge.pieces.blend import per_task, summed
from calmerge.pieces.spectral import truncated

Operator = Callable[[Tensor, Tensor, tuple[object, ...]], Tensor]
"""From [T, ...], one weight for each task and the key of a draw to what is left of them together."""
_ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def peft(
    tvs: TaskVectors,
    *,
    combination: Literal[
        "svd", "cat", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
        "magnitude_prune", "magnitude_prune_svd",
    ] = "svd",
    weights: Sequence[float] | None = None,
    density: KeepFraction | None = None,
    majority: Literal["total", "frequency"] = "total",
    svd_rank: Count | None = None,
    seed: Seed = 0,
) -> Weights:  # fmt: skip
    """Adapters combined as PEFT's `add_weighted_adapter` does, module by module.

    cat: sum_t w_t s_t B_t A_t. svd, *_svd: an operator on the s_t B_t A_t, cut to a rank. linear and the others: the
    operator on the A_t and, apart, on the B_t, with weights sqrt(|w_t s_t|): B A = (sum_t sqrt(c_t) B_t)
    (sum_t sqrt(c_t) A_t), which is not the sum of the updates but has a term for each pair of adapters.

    For parity only; to merge updates, give adapters to any other method. Tensors that are no product of factors (which
    PEFT refuses) are merged by the operator, uncut.

    Args:
        tvs: task vectors of T experts, adapters as they were read.
        combination: PEFT's `combination_type`.
        weights: w, one for each expert, or a single one for all; 1 when None.
        density: fraction kept of each tensor, which ties, dare_* and magnitude_prune need, in (0, 1]. A rate of DARE is
            1 - density.
        majority: whether signs are elected by the `total` of the values or by the `frequency` of each sign.
        svd_rank: of svd and *_svd; the largest rank of the inputs when None.
        seed: names the draw of dare_*.

    >>> from calmerge import Adapter
    >>> a, b = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> pair = {"a": Adapter({"q.lora_A.weight": a, "q.lora_B.weight": b}, {"r": 1, "lora_alpha": 1}),
    ...         "b": Adapter({"q.lora_A.weight": b, "q.lora_B.weight": 3 * b}, {"r": 1, "lora_alpha": 1})}
    >>> tvs = task_vectors({"q.weight": torch.zeros(1, 1)}, pair)
    >>> for combination in ("cat", "linear"):  # (2 + 3) / 2, and (2 + 1) (1 + 3) / 2
    ...     round(peft(tvs, combination=combination, weights=[0.5, 0.5])["q.weight"].item(), 4)
    2.5
    6.0

    Source: Mangrulkar et al., huggingface/peft 0.21.2 (Apache-2.0); ties and dare_* after Yadav et al., NeurIPS 2023,
    and Yu et al., ICML 2024.
    Differences: a merged rsLoRA adapter is not scaled by sqrt(rank) again, fewer weights than adapters and densities
    above 1 are errors, entries of equal magnitude are kept from the first on, draws are keyed, and DoRA is not dropped.
    `svd_clamp` is not offered: what it cuts depends on the free signs of singular vectors.
    """
    given = {"combination": combination, "weights": weights, "density": density, "majority": majority}
    raise_together(check(peft, given | {"svd_rank": svd_rank, "seed": seed}))
    w = _weights(tvs, weights)
    if len(tvs.tasks) == 1:
        combination = "linear"  # as PEFT does, whatever is asked for
    operator = _operator(combination.removesuffix("_svd"), density, majority, seed, tvs.tasks)
    if combination in _ON_FACTORS:
        _check_ranks(tvs, combination)
    ranks = [r for n in tvs for r in tvs.ranks(n) or ()]
    cut = svd_rank or max(ranks, default=0) if combination.endswith("svd") else None
    return _Combined(tvs, operator, w, on_factors=combination in _ON_FACTORS, rank=cut)


def _weights(tvs: TaskVectors, weights: Sequence[float] | None) -> Tensor:
    given = [1.0] if weights is None else list(weights)
    if len(given) not in (1, len(tvs.tasks)):
        raise UsageError(f"peft.weights must be one number, or one for each of {len(tvs.tasks)} experts, got {given}.")
    return torch.tensor(given, dtype=torch.float32).expand(len(tvs.tasks))


def _check_ranks(tvs: TaskVectors, combination: str) -> None:
    for name in tvs:
        ranks = {r for r in tvs.ranks(name) or () if r}
        if len(ranks) > 1:
            raise UsageError(
                f"peft.combination '{combination}' adds up factors, so that all must have one rank; in '{name}' they "
                f"have {', '.join(map(str, sorted(ranks)))}. Use 'cat' or 'svd', or any method that merges updates."
            )


def _operator(kind: str, density: float | None, majority: str, seed: int, tasks: Sequence[str]) -> Operator:
    """What a combination type does with the tensors of T tasks."""
    if kind in ("svd", "cat", "linear"):
        return lambda x, w, key: summed(x * per_task(w, x))
    if density is None:
        raise UsageError(f"peft.combination '{kind}' needs a density: the fraction of entries kept, in (0, 1].")

    def pruned(x: Tensor, key: tuple[object, ...]) -> Tensor:
        if density == 1:
            return x
        if kind.startswith("dare"):
            draws = torch.stack([uniform(tuple(x.shape[1:]), seed, *key, task) for task in tasks])
            return x.where(draws < density, 0.0) / density
        return torch.stack([_largest(part, int(density * part.numel())) for part in x])

    if not kind.endswith("ties"):
        return lambda x, w, key: summed(pruned(x, key) * per_task(w, x))

    def elected(x: Tensor, w: Tensor, key: tuple[object, ...]) -> Tensor:
        x = pruned(x, key)
        votes = summed(x if majority == "total" else x.sign())
        agree = x.sign() == torch.where(votes >= 0, 1.0, -1.0)
        return summed(x * per_task(w, x) * agree) / agree.sum(0).clamp(min=1)

    return elected


def _largest(x: Tensor, k: int) -> Tensor:
    """Exactly the k entries of largest magnitude, the first ones of those that are equal; 0 elsewhere."""
    order = x.abs().flatten().argsort(descending=True, stable=True)[:k]
    result = torch.zeros_like(x)
    result.view(-1)[order] = x.flatten()[order]
    return result


class _Combined(Weights):
    """Each tensor by one operator, on factors or on updates, cut to a rank where one is given."""

    elementwise = False

    def __init__(self, tvs: TaskVectors, operator: Operator, w: Tensor, *, on_factors: bool, rank: int | None) -> None:
        self._tvs, self._operator, self._w, self._on_factors, self._rank = tvs, operator, w, on_factors, rank
        self.inputs = (tvs,)
        self.specs = {name: Spec(spec.shape, torch.float32) for name, spec in tvs.specs.items()}

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        if self._tvs.ranks(name) is None:
            result = self._operator(self._tvs.read(name, ALL, memo), self._w, (name,))
        elif self._on_factors:
            a, b = self.factors(name)
            result = b @ a
        else:
            tau = self._tvs.read(name, ALL, memo).flatten(2)
            result = self._operator(tau, self._w, (name,))
            result = result if self._rank is None else truncated(result, self._rank)
        result = result.reshape(self.specs[name].shape)
        return result if rows == ALL else result[rows]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of the combination; an adapter that lacks the module counts as zeros, which change no operator."""
        found = self._tvs.factors(name)
        c = torch.tensor([f.scale * (f.right.numel() > 0) for f in found]) * self._w
        like = max(found, key=lambda f: f.right.numel())
        a = torch.stack([f.right if f.right.numel() else torch.zeros_like(like.right) for f in found])
        b = torch.stack([f.left if f.left.numel() else torch.zeros_like(like.left) for f in found])
        combined_a = self._operator(a, c.sign() * c.abs().sqrt(), (name, "A"))
        return combined_a, self._operator(b, c.abs().sqrt(), (name, "B"))
