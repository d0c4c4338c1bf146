"""Which examples take part, and in which batches."""

import pytest
import torch

from calmerge import UsageError
from calmerge._random import uniform
from calmerge.fitting import Pool, credible, shuffled
from calmerge.fitting.samplers import entropies

# Two classes; entropies .0402 .0901 .1909 .3653 .5822 .6628 .6735
LOGITS = torch.tensor([[5.0, 0], [4, 0], [3, 0], [2, 0], [1, 0], [0, 0.5], [0, 0.4]])


def test_entropies_of_the_worked_example() -> None:
    expected = [0.0402, 0.0901, 0.1909, 0.3653, 0.5822, 0.6628, 0.6735]
    assert entropies(LOGITS).tolist() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_do_not_overflow(scale: float) -> None:
    h = entropies(torch.tensor([[scale, 0.0, -scale], [scale, scale, 0.0]]))
    assert h.tolist() == pytest.approx([0.0, 0.6931], abs=1e-4)


def test_plain_sampling_may_keep_one_class_only() -> None:
    assert credible(LOGITS, ratio=0.5, sampling="plain").indices.tolist() == [0, 1, 2]


def test_class_balanced_sampling_keeps_the_ratio_in_every_class() -> None:
    found = credible(LOGITS, ratio=0.5)
    assert found.indices.tolist() == [0, 1, 5]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.coverage.tolist() == [[5, 2], [2, 1]]


def test_a_class_predicted_once_loses_its_only_sample() -> None:
    assert credible(LOGITS[:6], ratio=0.5).indices.tolist() == [0, 1]
    found = credible(LOGITS[:6], ratio=0.9)
    assert found.indices.tolist() == [0, 1, 2, 3]
    assert found.coverage.tolist() == [[5, 4], [1, 0]]
    assert credible(LOGITS[:6], ratio=1.0).indices.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_class_never_predicted_contributes_nothing() -> None:
    found = credible(torch.cat([LOGITS, torch.full((7, 1), -9.0)], 1), ratio=1.0)
    assert found.coverage.tolist() == [[5, 5], [2, 2], [0, 0]]


def test_all_keeps_everything_with_its_pseudo_label() -> None:
    found = credible(LOGITS, ratio=0.1, sampling="all")
    assert found.indices.tolist() == list(range(7))
    assert found.labels.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_equal_entropies_keep_the_earlier_sample() -> None:
    assert credible(torch.zeros(4, 2), ratio=0.5).indices.tolist() == [0, 1]


def test_pseudo_labels_are_the_argmax_not_the_sign_of_anything_else() -> None:
    logits = uniform((50, 7), "logits")
    found = credible(logits, ratio=1.0)
    assert found.indices.tolist() == list(range(50))
    assert torch.equal(found.labels, logits.argmax(1))


def test_batches_are_the_first_of_one_shuffle() -> None:
    batches = list(shuffled({"a": Pool(torch.arange(10) + 100)}, size=4, count=2)(0))
    indices = torch.cat([b.indices for b in batches]).tolist()
    assert [len(b.indices) for b in batches] == [4, 4]
    assert len(set(indices)) == 8
    assert set(indices) <= set(range(100, 110))


@pytest.mark.parametrize(("n", "sizes"), [(3, [3]), (4, [4]), (5, [4, 1]), (9, [4, 4])])
def test_a_pool_smaller_than_its_batches_gives_fewer_or_shorter_ones(n: int, sizes: list[int]) -> None:
    assert [len(b.indices) for b in shuffled({"a": Pool(torch.arange(n))}, size=4, count=2)(0)] == sizes


def test_fresh_batches_of_a_small_pool_are_as_many_as_asked_for() -> None:
    batches = list(shuffled({"a": Pool(torch.arange(3))}, size=4, count=3, fresh=True)(0))
    assert [sorted(b.indices.tolist()) for b in batches] == [[0, 1, 2]] * 3
    assert len({tuple(b.indices.tolist()) for b in batches}) > 1


def test_every_update_has_a_shuffle_of_its_own() -> None:
    batches = shuffled({"a": Pool(torch.arange(100))}, size=10, count=1)
    drawn = {tuple(next(batches(step)).indices.tolist()) for step in range(5)}
    assert len(drawn) == 5


def test_a_draw_depends_on_seed_task_and_update_alone() -> None:
    """Not on what was drawn before, nor on which other tasks there are: a resumed run sees the same batches."""
    pools = {"a": Pool(torch.arange(50)), "b": Pool(torch.arange(50))}
    batches = shuffled(pools, size=5, count=1, seed=3)
    first = [b.indices.tolist() for b in batches(7)]
    list(batches(0))
    assert [b.indices.tolist() for b in batches(7)] == first
    assert [b.indices.tolist() for b in shuffled({"b": pools["b"]}, size=5, count=1, seed=3)(7)] == first[1:]
    assert first[0] != first[1]
    assert [b.indices.tolist() for b in shuffled(pools, size=5, count=1, seed=4)(7)] != first


def test_credible_pools_bring_their_labels_along() -> None:
    pool = credible(LOGITS, ratio=0.5)
    (batch,) = shuffled({"a": pool.pool}, size=8, count=2)(0)
    label = dict(zip([0, 1, 5], [0, 0, 1], strict=True))
    assert batch.targets.tolist() == [label[i] for i in batch.indices.tolist()]
    (bare,) = shuffled({"a": Pool(pool.indices)}, size=8, count=2)(0)
    assert bare.targets is None


@pytest.mark.parametrize("ratio", [90, 0.0, -1.0])
def test_a_percentage_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match=r"credible.ratio must lie in \(0, 1\], got"):
        credible(LOGITS, ratio=ratio)


def test_a_sampling_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"credible.sampling must be 'class_balanced' or 'plain' or 'all', got 'plane'"
    ):
        credible(LOGITS, sampling="plane")  # type: ignore[arg-type]
