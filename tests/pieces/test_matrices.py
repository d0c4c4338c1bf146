"""Which tensors are matrices, and what happens to the rest."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, UsageError, add, task_vectors, tsv_m
from calmerge._plan import plan
from calmerge._random import uniform
from calmerge._weights import ALL, blocks
from calmerge.pieces.matrices import is_matrix, reduce_matrices, transform_matrices
from calmerge.pieces.spectral import svd, truncated

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "spectral", key) - 0.5


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("layers.0.fc.weight", 2, True),
        ("embeddings.position_embedding.weight", 2, True),
        ("visual.proj", 2, True),
        ("layers.0.fc.bias", 1, False),
        ("patch_embedding.weight", 4, False),
        ("gain", 0, False),
        ("text_projection", 2, False),
        ("model.embed_tokens.weight", 2, False),
        ("bert.embeddings.word_embeddings.weight", 2, False),
        ("transformer.wte.weight", 2, False),
        ("lm_head.weight", 2, False),
    ],
)
def test_which_tensors_are_matrices(name: str, dims: int, expected: bool) -> None:
    assert is_matrix(name, dims) == expected


def mixed() -> TaskVectors:
    names = {"fc.weight": (6, 2), "embed_tokens.weight": (3, 2), "conv.weight": (2, 2, 1, 1), "bias": (2,), "gain": ()}
    base = {n: torch.zeros(shape) for n, shape in names.items()}
    return task_vectors(base, {t: {n: noise(*shape, key=(t, n)) for n, shape in names.items()} for t in "abc"})


def test_all_other_tensors_are_averaged() -> None:
    tvs = mixed()
    merged = reduce_matrices(tvs, lambda tau, site: torch.zeros_like(tau[0]))
    assert merged["fc.weight"].abs().sum() == 0
    for name in ("embed_tokens.weight", "conv.weight", "bias", "gain"):
        near(merged[name], tvs[name].mean(0))
    skipped = reduce_matrices(tvs, lambda tau, site: torch.zeros_like(tau[0]), skip=["fc.*"])
    near(skipped["fc.weight"], tvs["fc.weight"].mean(0))
    assert skipped["embed_tokens.weight"].abs().sum() == 0


def test_fused_matrices_can_be_treated_apart() -> None:
    tvs = mixed()

    def rank_one(tau: Tensor, site: object) -> Tensor:
        return truncated(tau.sum(0), 1)

    fused, apart = (reduce_matrices(tvs, rank_one, split=s)["fc.weight"] for s in ([], ["fc.weight"]))
    assert len(svd(fused).s) == 1
    assert [len(svd(part).s) for part in apart.chunk(3)] == [1, 1, 1]
    near(apart[2:4], rank_one(tvs["fc.weight"][:, 2:4], None))


def test_patterns_are_checked_at_once() -> None:
    with pytest.raises(UsageError, match=r"skip: 'fc.wieght' fits no tensor. Did you mean 'fc.weight'"):
        reduce_matrices(mixed(), lambda tau, site: tau[0], skip=["fc.wieght"])
    with pytest.raises(UsageError, match=r"split: 'qkv' fits no tensor"):
        reduce_matrices(mixed(), lambda tau, site: tau[0], split=["qkv"])
    tvs = task_vectors({"qkv.weight": torch.zeros(4, 2)}, {"a": {"qkv.weight": torch.ones(4, 2)}})
    with pytest.raises(UsageError, match=r"tensor 'qkv.weight' has 4 rows, which cannot be cut into three equal"):
        reduce_matrices(tvs, lambda tau, site: tau[0], split=["qkv*"])


def test_a_matrix_without_entries_stays_empty() -> None:
    tvs = task_vectors({"w": torch.zeros(0, 3)}, {"a": {"w": torch.zeros(0, 3)}})
    assert reduce_matrices(tvs, lambda tau, site: svd(tau[0]).product())["w"].shape == (0, 3)


def test_task_vectors_of_other_tensors_stay() -> None:
    tvs = mixed()
    doubled = transform_matrices(tvs, lambda tau, site: 2 * tau, split=["fc.weight"])
    assert torch.equal(doubled["fc.weight"], 2 * tvs["fc.weight"])
    assert all(torch.equal(doubled[n], tvs[n]) for n in tvs if n != "fc.weight")


def test_other_weights_are_cut_as_the_task_vectors_are() -> None:
    tvs = mixed()
    mean = reduce_matrices(tvs, lambda tau, site: tau.mean(0))

    def gap(tau: Tensor, stack: Tensor, delta: Tensor, site: object) -> Tensor:
        assert tau.shape == stack.shape == (3, 2, 2)
        return tau[0] + stack[1] - delta

    found = reduce_matrices(tvs, gap, tvs, mean, split=["fc.weight"])["fc.weight"]
    near(found, tvs["fc.weight"][0] + tvs["fc.weight"][1] - tvs["fc.weight"].mean(0))


def test_only_matrices_are_read_whole() -> None:
    """A table of a vocabulary is averaged row by row, and neither it nor its size counts in the plan as a matrix."""
    shapes = {"fc.weight": (40, 30), "embed_tokens.weight": (5000, 30), "bias": (3000,)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    tvs = task_vectors(base, {t: {n: noise(*s, key=(t, n)) for n, s in shapes.items()} for t in "ab"})
    merged = add(tvs.base, tsv_m(tvs))
    cut = [name for name, rows in blocks(merged, 1000) if rows != ALL]
    assert set(cut) == {"embed_tokens.weight", "bias"}
    assert not merged.elementwise
    assert merged.whole("fc.weight")
    near(torch.cat([merged.read("bias", r) for n, r in blocks(merged, 1000) if n == "bias"]), tvs["bias"].mean(0))
    found = plan(merged, chunk=1000, threads=1)
    assert (found.kind, found.passes, found.reads) == ("B", 1, 3 * merged.nbytes)
    assert found.memory < 40 * 40 * 30 * 4 * 2
