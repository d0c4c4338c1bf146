"""Randomness keyed by name and index."""

import pytest
import torch

from calmerge._random import bernoulli, permutation, uniform


def test_numbers_never_change_between_versions() -> None:
    """Literals: a changed generator changes every seeded result that users have."""
    assert uniform((4,), 0, "w", "cars").tolist() == [
        0.30087810754776,
        0.6034989953041077,
        0.7875482439994812,
        0.6250713467597961,
    ]
    assert permutation(8, 0, "pool").tolist() == [6, 1, 4, 7, 2, 0, 5, 3]
    assert bernoulli((8,), 0.5, 0, "w", "cars").tolist() == [False, False, False, True, False, True, True, False]


def test_uniform_lies_in_0_1_with_the_right_moments() -> None:
    u = uniform((200_000,), "moments")
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert u.double().mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 200_000) ** 0.5)
    assert u.double().var().item() == pytest.approx(1 / 12, abs=1e-3)


def test_uniform_fills_every_bin_evenly() -> None:
    counts = torch.histc(uniform((160_000,), "bins"), bins=16, min=0, max=1)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum().item()
    assert chi_square < 45  # 15 degrees of freedom: 1 in 10,000 is above 44.3


def test_neighbours_and_streams_are_not_correlated() -> None:
    u, v = uniform((100_000,), 0, "a") - 0.5, uniform((100_000,), 0, "b") - 0.5
    for x, y in ((u[1:], u[:-1]), (u, v), (u, uniform((100_000,), 1, "a") - 0.5)):
        assert abs((x * y).mean().item() * 12) < 0.013  # four standard errors


@pytest.mark.parametrize("cut", [1, 7, 64, 99])
def test_a_piece_is_what_the_whole_has_there(cut: int) -> None:
    whole = uniform((100,), 3, "w")
    assert torch.equal(torch.cat([uniform((cut,), 3, "w"), uniform((100 - cut,), 3, "w", offset=cut)]), whole)


def test_shape_only_folds_the_row_major_order() -> None:
    assert torch.equal(uniform((3, 4), "w").flatten(), uniform((12,), "w"))
    assert uniform((), "w").shape == ()
    assert uniform((0, 3), "w").shape == (0, 3)


def test_the_key_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(0)
    first = uniform((5,), 0, "w", "cars")
    torch.manual_seed(1)
    assert torch.equal(first, uniform((5,), 0, "w", "cars"))
    for key in ((1, "w", "cars"), (0, "v", "cars"), (0, "w", "dtd"), ("0", "w", "cars")):
        assert not torch.equal(first, uniform((5,), *key))


def test_offsets_beyond_2_to_the_32_work() -> None:
    far = uniform((3,), "w", offset=2**40)
    assert torch.equal(far[1:], uniform((2,), "w", offset=2**40 + 1))


def test_permutation_is_one_and_depends_on_its_key() -> None:
    assert sorted(permutation(1000, 0, "a").tolist()) == list(range(1000))
    assert permutation(1000, 0, "a").tolist() != permutation(1000, 0, "b").tolist()
    assert permutation(0, "x").tolist() == []


def test_every_position_is_as_likely_for_the_first_element() -> None:
    places = torch.bincount(torch.stack([permutation(4, i)[0] for i in range(4000)]), minlength=4)
    assert ((places - 1000).abs() < 110).all()  # four standard deviations


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_bernoulli_is_true_in_its_share(share: float) -> None:
    n = 400_000
    found = bernoulli((n,), share, "share").double().mean().item()
    assert abs(found - share) <= 4 * (share * (1 - share) / n) ** 0.5


def test_a_share_finer_than_half_a_word_is_kept() -> None:
    n, share = 3_000_000, 1.5 / 65536
    found = int(bernoulli((n,), share, "fine").sum())
    assert abs(found - n * share) < 4 * (n * share) ** 0.5  # 69, and 46 or 92 if the lower half did not count


def test_every_entry_may_have_its_own_share() -> None:
    n = 200_000
    shares = torch.tensor([0.1, 0.9]).repeat(n // 2)
    found = bernoulli((n,), shares, "own")
    for one in (0.1, 0.9):
        assert torch.equal(found[shares == one], bernoulli((n,), one, "own")[shares == one])


def test_neighbours_and_streams_of_bernoulli_are_independent() -> None:
    n = 400_000
    u, v = bernoulli((n,), 0.5, 0, "a").double() - 0.5, bernoulli((n,), 0.5, 0, "b").double() - 0.5
    for x, y in ((u[1:], u[:-1]), (u[2:], u[:-2]), (u, v), (u[0::2], u[1::2])):
        assert abs((x * y).mean().item() * 4) < 4 / len(x) ** 0.5


@pytest.mark.parametrize("start", [0, 2**32 - 50, 2**33 + 1])
@pytest.mark.parametrize("cut", [1, 7, 64, 99])
def test_a_piece_of_bernoulli_is_what_the_whole_has_there(start: int, cut: int) -> None:
    whole = bernoulli((100,), 0.3, "w", offset=start)
    pieces = [bernoulli((cut,), 0.3, "w", offset=start), bernoulli((100 - cut,), 0.3, "w", offset=start + cut)]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(whole, bernoulli((100,), 0.3, "w", offset=start + 2**34))
