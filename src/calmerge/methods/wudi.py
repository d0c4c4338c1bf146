"""WUDI-Merging (Cheng et al., ICML 2025)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from calmerge._signature import Interval, Positive, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import summed
from calmerge.pieces.descend import adam
from calmerge.pieces.least_squares import gram_closed_form
from calmerge.pieces.matrices import REST, TABLES, is_matrix, reduce_matrices


def wudi(
    tvs: TaskVectors,
    *,
    solver: Literal["adam", "closed_form"] = "adam",
    steps: Annotated[int, Interval(0)] = 300,
    lr: Positive | Literal["relative"] = 1e-5,
    ridge: Positive = 1e-3,
    rest: Literal["mean", "base"] = "mean",
    scale: Annotated[float, Interval()] = 1.0,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """The matrix that disturbs each expert least on the subspace of its own task vector, found without data.

    M = argmin sum_t ||(M - Delta_t) Delta_t^T||_F^2 / ||Delta_t||_F^2, from M = sum_t Delta_t; theta = theta_0 + M.
    The rows of a task vector stand in for the inputs that made them.

    Holds T + 4 copies of one tensor and a Gram matrix of its columns.

    Args:
        tvs: task vectors of T experts.
        solver: `adam` is the official early-stopped descent; `closed_form` the minimiser itself.
        steps: Adam's number of steps.
        lr: Adam's step, which is absolute: 1e-5 suits updates of about 1e-3 an entry, as CLIP's, and 300 steps move no
            entry by more than about 3e-3. Language models were run with 2e-5; `relative` is 1e-2 of the task
            vectors' root mean square in the tensor at hand.
        ridge: of the closed form, relative to the mean of each Gram matrix's diagonal.
        rest: what other tensors become: the mean of the experts, or the base, as in the official vision code.
        scale: multiplies M; the method has no coefficient.
        skip: shell patterns of matrices that are treated like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1, 1)}, {"a": {"w": torch.ones(1, 1)}, "b": {"w": 3 * torch.ones(1, 1)}})
    >>> wudi(tvs)["w"], wudi(tvs, solver="closed_form")["w"]
    (tensor([[3.9970]]), tensor([[2.]]))

    Source: Cheng, Xiong, Wei, Zhu, Yuan, "Whoever Started the Interference Should End It: Guiding Data-Free Model
    Merging via Task Vectors", ICML 2025; nathanielyvo/WUDI-Merging (MIT).
    Differences: the official vision code treats attention and MLP weights only and leaves all else at the base; here
    all matrices but those in `skip` are treated, and the rest is averaged unless asked. An expert without update in a
    tensor is left out there (officially NaN).
    """
    raise_together(
        check(
            wudi,
            {
                "solver": solver, "steps": steps, "lr": lr, "ridge": ridge, "rest": rest, "scale": scale,
                "skip": skip, "split": split,
            },
        )
    )  # fmt: skip

    def rows(delta: Tensor) -> Tensor:
        return delta.T @ delta / delta.square().sum()

    def least(tau: Tensor, site: Site) -> Tensor:
        deltas = [delta for delta in tau if delta.any()]
        if not deltas:
            return tau[0]
        if solver == "closed_form":
            return gram_closed_form(deltas, (rows(delta) for delta in deltas), ridge=ridge)
        inputs, seen = torch.zeros_like(rows(deltas[0])), torch.zeros_like(deltas[0])
        for delta in deltas:
            inputs += rows(delta)
            seen += delta @ rows(delta)
        step = 1e-2 * float(tau.square().mean().sqrt()) if lr == "relative" else lr
        return adam(summed(tau), lambda m: 2 * (m @ inputs - seen), lr=step, steps=steps)

    wide = max(
        [s.shape[1] / s.shape[0] for n, s in tvs.specs.items() if is_matrix(n, len(s.shape), skip) and s.numel] or [1]
    )
    copies = int(12 + (3 if solver == "adam" else 9) * wide)  # Gram matrices are n x n, in float64 for the closed form
    merged = reduce_matrices(tvs, least, skip=skip, split=split, rest=REST[rest], copies=copies)
    return merged.map(lambda tau, site: tau * scale)
