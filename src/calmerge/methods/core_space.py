"""Core Space merging of LoRA adapters (NeurIPS 2025)."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from calmerge._lora import product
from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import ALL, Memo, Spec, StateDict, Weights
from calmerge.methods.tsv_m import tsv_m
from calmerge.pieces.low_rank import balanced, left_basis

_SMALL = 2**20
"""Entries of a tensor that is read whole for every block of it, where it is no product of factors."""


def core_space(
    tvs: TaskVectors,
    *,
    inner: Merge = tsv_m,
    scale: Annotated[float, Interval()] = 1.0,
    joint: bool = False,
    balance: bool = True,
) -> Weights:
    """Adapters merged in the small space that their factors span together.

    U = left singular vectors of [B_1 .. B_T], V = right ones of [A_1; ..; A_T]; M_t = U^T B_t A_t V, R x R with R the
    sum of the ranks, and U M_t V^T = B_t A_t exactly; Delta = lambda U inner(M_1 .. M_T) V^T.

    What is no product of factors (full tensors, biases, DoRA, experts that are no adapters, vectors that were changed
    before) is merged by `inner` where it is. Holds the factors and cores of one tensor at a time; costs
    O((m + n) R^2 + R^3) a tensor instead of the SVD of an m x n matrix.

    Args:
        tvs: task vectors of T experts, best all of them adapters.
        inner: the merge of the cores; a linear one gives what it gives outside, as no basis changes a sum.
        scale: lambda.
        joint: whether `inner` sees all tensors at once (one threshold for the model) instead of each alone.
        balance: whether factors are first brought to U sqrt(S), sqrt(S) V^T, so that the result depends on the
            products alone; without it (as published) a method such as ties depends on how an adapter was stored.

    >>> from calmerge import Adapter, task_arithmetic
    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    >>> one = Adapter({"q.lora_A.weight": a, "q.lora_B.weight": b}, {"r": 1, "lora_alpha": 1})
    >>> tvs = task_vectors({"q.weight": torch.zeros(2, 2)}, {"a": one, "b": one})
    >>> core_space(tvs, inner=task_arithmetic, scale=1 / 0.3)["q.weight"].round(decimals=4)
    tensor([[ 2.,  4.],
            [ 6., 12.]])

    Source: Panariello, Marczak, Magistri, Porrello, Twardowski, Bagdanov, Calderara, van de Weijer, "Accurate and
    Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025; apanariello4/core-space-merging (Apache-2.0).
    Differences: factors are balanced first unless told otherwise. Isotropic methods are not what they are outside: the
    mean is over R singular values instead of min(m, n).
    """
    raise_together(check(core_space, {"inner": inner, "scale": scale, "joint": joint, "balance": balance}))
    cores = _Cores(tvs, balance=balance)
    small = TaskVectors(
        cores, tvs.tasks, StateDict({}), experts={t: StateDict({}) for t in tvs.tasks}, skipped=tvs.skipped
    )
    merged = {n: inner(small.only_names([n])) for n in tvs} if not joint else dict.fromkeys(tvs, inner(small))
    return _Outside(tvs, cores, merged, scale)


class _Cores(Weights):
    """[T, R, R'] of every tensor that is a product of factors in all tasks; other tensors as they are."""

    row_dim = 1
    elementwise = False

    def __init__(self, tvs: TaskVectors, *, balance: bool) -> None:
        self._tvs, self._balance, self.inputs = tvs, balance, (tvs,)
        self.low = {n for n in tvs if tvs.ranks(n) is not None}
        self.specs = {n: self._spec(n, spec) for n, spec in tvs.specs.items()}
        self.found = lru_cache(maxsize=4)(self._find)

    def _spec(self, name: str, spec: Spec) -> Spec:
        if name not in self.low:
            return Spec(spec.shape, torch.float32)
        rows, columns = spec.shape[0], torch.Size(spec.shape[1:]).numel()
        rank = sum(min(r, rows, columns) if self._balance else r for r in self._tvs.ranks(name) or ())
        return Spec((min(rank, rows), min(rank, columns)), torch.float32)

    def _find(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U [m, R], the cores [T, R, R'] and V [n, R'] of one tensor, in float64."""
        factors = self._tvs.factors(name)
        pairs = [balanced(f) if self._balance else (f.scaled.double(), f.right.double()) for f in factors]
        u = left_basis([left for left, _ in pairs])
        v = left_basis([right.T for _, right in pairs])
        return u, torch.stack([(u.T @ left) @ (right @ v) for left, right in pairs]), v

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        stack = self.found(name)[1].float() if name in self.low else self._tvs.read(name, ALL, memo)
        return stack if rows == ALL else stack[:, rows]


class _Outside(Weights):
    """Merged cores brought back to the shape of their tensors: rows of U M times V^T."""

    def __init__(self, tvs: TaskVectors, cores: _Cores, merged: Mapping[str, Weights], scale: float) -> None:
        self._cores, self._merged, self._scale = cores, merged, scale
        self.inputs = tuple({id(w): w for w in merged.values()}.values())
        self.specs = {n: Spec(spec.shape, torch.float32) for n, spec in tvs.specs.items()}
        self.elementwise = all(n in cores.low or spec.numel <= _SMALL for n, spec in tvs.specs.items())
        self._product = lru_cache(maxsize=4)(self._find)

    def _find(self, name: str) -> tuple[Tensor, Tensor]:
        u, _, v = self._cores.found(name)
        return (u @ self._merged[name].read(name).to(u)).float(), v.T.float().contiguous()

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        if name not in self._cores.low:
            return self._merged[name].read(name, rows, memo) * self._scale
        part = product(*self._product(name), rows) * self._scale
        return part.reshape(-1, *self.specs[name].shape[1:])
