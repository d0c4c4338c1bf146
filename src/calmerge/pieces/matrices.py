"""Which tensors are treated as matrices, and what is done with all others."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Gathered, Node, Weights
from calmerge.pieces.blend import averaged

TABLES = (
    "*text_projection*", "*embed_tokens*", "*token_embedding*", "*word_embeddings*", "*wte.weight", "*lm_head*",
    "shared.weight",
)  # fmt: skip
"""What `skip` is by default: CLIP's text projection, which the official codes leave out, and tables of a vocabulary."""

Fn = Callable[..., Tensor]
REST: Mapping[str, Fn] = {"mean": lambda tau, *_: averaged(tau), "base": lambda tau, *_: torch.zeros_like(tau[0])}
"""What methods with an option `rest` make of tensors that are no matrices: the experts' mean, or the base."""


def is_matrix(name: str, dims: int, skip: Sequence[str] = TABLES) -> bool:
    """Whether a tensor is treated as a matrix: it has two dimensions and no pattern in `skip` fits its name.

    >>> is_matrix("fc.weight", 2), is_matrix("fc.bias", 1), is_matrix("conv.weight", 4), is_matrix("lm_head.weight", 2)
    (True, False, False, False)
    """
    return dims == 2 and not _fits(name, skip)


def reduce_matrices(
    tvs: TaskVectors,
    fn: Fn,
    *others: Node,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
    rest: Fn = REST["mean"],
    copies: int | None = None,
) -> Weights:
    """One delta, `fn(tau, *others, site)` of every matrix and the mean over tasks of all other tensors.

    Matrices are read whole: T of one in float32 are held, and what `fn` makes of them. All else is read by rows.

    Args:
        tvs: task vectors of T experts.
        fn: from [T, m, n] to [m, n], of any floating type.
        others: weights or task vectors of the same names.
        skip: shell patterns of matrices that are not treated as such.
        split: shell patterns of matrices that are three of equal height in one (fused query, key, value); `fn` gets
            each alone.
        rest: what is made of all other tensors, called as `fn` is, on some of their rows at a time.
        copies: how many float32 copies of a matrix `fn` holds at most, for the plan.

    Raises:
        UsageError: a pattern fits no tensor, or a tensor to split has not three times the rows of anything.

    >>> experts = {t: {"w": torch.eye(2) * c, "b": torch.ones(2) * c} for t, c in {"a": 1.0, "b": 3.0}.items()}
    >>> tvs = task_vectors({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, experts)
    >>> dict(reduce_matrices(tvs, lambda tau, site: tau.amax(0)))
    {'w': tensor([[3., 0.], [0., 3.]]), 'b': tensor([2., 2.])}
    """
    check_patterns(tvs, skip, split)
    ours = _matrices(tvs, skip)
    done = tvs.only_names(ours).reduce(_parted(fn, split), *others, elementwise=False, copies=copies)
    left = tvs.only_names(n for n in tvs if n not in done.specs).reduce(rest, *others)
    return Gathered({n: (done if n in done.specs else left, n) for n in tvs})


def transform_matrices(
    tvs: TaskVectors,
    fn: Fn,
    *others: Node,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
    copies: int | None = None,
) -> TaskVectors:
    """Task vectors with `fn(tau, *others, site)` of every matrix, [T, m, n] to [T, m, n], all other tensors unchanged.

    Arguments, errors and memory are those of `reduce_matrices`.

    >>> base, ones = {"w": torch.zeros(1, 2), "b": torch.zeros(1)}, {"w": torch.ones(1, 2), "b": torch.ones(1)}
    >>> tvs = task_vectors(base, {"a": ones})
    >>> dict(transform_matrices(tvs, lambda tau, site: 3 * tau))
    {'w': tensor([[[3., 3.]]]), 'b': tensor([[1.]])}
    """
    check_patterns(tvs, skip, split)
    ours = _matrices(tvs, skip)
    done = tvs.only_names(ours).transform(_parted(fn, split), *others, elementwise=False, copies=copies)
    return tvs.replaced(done)


def _matrices(tvs: TaskVectors, skip: Sequence[str]) -> list[str]:
    return [n for n, spec in tvs.specs.items() if is_matrix(n, len(spec.shape), skip) and spec.numel]


def _parted(fn: Fn, split: Sequence[str]) -> Fn:
    """`fn` on whole matrices, or on the three parts of those that are to be split."""

    def applied(tau: Tensor, *given: Tensor) -> Tensor:
        *others, site = given
        if not _fits(site.name, split):  # type: ignore[attr-defined]
            return fn(tau, *given).float()
        parts = zip(*(stack.chunk(3, -2) for stack in (tau, *others)), strict=True)
        return torch.cat([fn(*part, site).float() for part in parts], -2)

    return applied


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(weights: Weights, skip: Sequence[str], split: Sequence[str] = ()) -> None:
    """Raise a UsageError if a pattern fits no tensor, or fits one that cannot be split into three.

    >>> from calmerge import StateDict
    >>> check_patterns(StateDict({"fc.weight": torch.zeros(2, 2)}), ["fc.wieght"])
    Traceback (most recent call last):
    calmerge._errors.UsageError: skip: 'fc.wieght' fits no tensor. Did you mean 'fc.weight'?
    """
    for option, patterns in (("skip", skip), ("split", split)):
        for pattern in patterns:
            if pattern not in TABLES and not any(fnmatchcase(name, pattern) for name in weights):
                raise UsageError(f"{option}: '{pattern}' fits no tensor. {did_you_mean(pattern, weights)}")
    for name, spec in weights.specs.items():
        if _fits(name, split) and len(spec.shape) == 2 and spec.shape[0] % 3:
            raise UsageError(
                f"split: tensor '{name}' has {spec.shape[0]} rows, which cannot be cut into three equal parts. "
                "Name only tensors that hold query, key and value below each other."
            )
