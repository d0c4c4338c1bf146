"""DARE: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch

from calmerge import TaskVectors, UsageError, add, average, dare, dare_ties, task_arithmetic, task_vectors, ties
from calmerge._random import uniform
from calmerge.pieces import trim
from calmerge.pieces.drop import drop_and_rescale


def ones(n: int, *tasks: str) -> TaskVectors:
    return task_vectors({"w": torch.zeros(n)}, {t: {"w": torch.ones(n)} for t in tasks})


def test_survivors_are_ten_times_as_large_and_the_mean_stays() -> None:
    dropped = dare(ones(10**6, "a"), rate=0.9, inner=average)["w"]
    assert torch.unique(dropped).tolist() == pytest.approx([0.0, 10.0], abs=1e-5)
    assert dropped.double().mean().item() == pytest.approx(1.0, abs=0.012)  # four standard errors


def test_drop_only_gives_a_tenth() -> None:
    dropped = drop_and_rescale(ones(10**6, "a"), rate=0.9, rescale=False)["w"]
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.0012)


def test_rate_0_is_the_identity_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr("calmerge.pieces.drop.bernoulli", fail)
    tvs = ones(4, "a")
    assert dare(tvs, rate=0.0, inner=average)["w"].tolist() == [1.0] * 4


def test_rate_1_returns_the_base() -> None:
    tvs = task_vectors({"w": torch.tensor([-0.0, 2.0])}, {"a": {"w": torch.ones(2)}})
    merged = add(tvs.base, dare(tvs, rate=1.0))["w"]
    assert merged.tolist() == [0.0, 2.0]
    assert merged[0].signbit()


def test_the_order_of_experts_does_not_change_the_draw() -> None:
    """A generator shared by all experts, as in the official code, fails this."""
    experts = {t: {"w": (uniform((50,), t) * 8).floor()} for t in "abc"}
    base = {"w": torch.zeros(50)}
    forward = drop_and_rescale(task_vectors(base, experts), rate=0.5)
    backward = drop_and_rescale(task_vectors(base, dict(reversed(experts.items()))), rate=0.5)
    assert torch.equal(forward["w"], backward["w"].flip(0))
    assert torch.equal(dare(task_vectors(base, experts), rate=0.5)["w"],
                       dare(task_vectors(base, dict(reversed(experts.items()))), rate=0.5)["w"])  # fmt: skip


def test_experts_tensors_and_seeds_are_drawn_apart() -> None:
    both = task_vectors(
        {"v": torch.zeros(64), "w": torch.zeros(64)},
        {t: {"v": torch.ones(64), "w": torch.ones(64)} for t in "ab"},
    )
    drawn = drop_and_rescale(both, rate=0.5)
    assert not torch.equal(drawn["w"][0], drawn["w"][1])
    assert not torch.equal(drawn["w"], drawn["v"])
    assert not torch.equal(drawn["w"], drop_and_rescale(both, rate=0.5, seed=1)["w"])
    assert torch.equal(drawn["w"], drop_and_rescale(both, rate=0.5, seed=0)["w"])


def test_another_expert_or_a_global_seed_does_not_change_the_draw() -> None:
    torch.manual_seed(1)
    alone = drop_and_rescale(ones(64, "b"), rate=0.5)["w"][0]
    torch.manual_seed(2)
    assert torch.equal(drop_and_rescale(ones(64, "a", "b"), rate=0.5)["w"][1], alone)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_any_rows_are_drawn_as_in_the_whole(step: int) -> None:
    tvs = task_vectors({"w": torch.zeros(20, 3)}, {"a": {"w": torch.ones(20, 3)}})
    drawn = dare(tvs, rate=0.5)
    parts = [drawn.read("w", slice(i, min(i + step, 20))) for i in range(0, 20, step)]
    assert torch.equal(torch.cat(parts), drawn["w"])


def test_biases_norms_and_numbers_are_dropped_like_matrices() -> None:
    tvs = task_vectors({"norm.bias": torch.zeros(2000)}, {"a": {"norm.bias": torch.ones(2000)}})
    assert (drop_and_rescale(tvs, rate=0.5)["norm.bias"] == 0).double().mean().item() == pytest.approx(0.5, abs=0.06)
    number = task_vectors({"g": torch.tensor(0.0)}, {"a": {"g": torch.tensor(1.0)}})
    drawn = {drop_and_rescale(number, rate=0.5, seed=s)["g"].item() for s in range(20)}
    assert drawn == {0.0, 2.0}


def test_the_output_of_a_linear_layer_is_unbiased_with_the_known_variance() -> None:
    """tau = [0.1, 0.2], x = [1, 1], p = 0.5: mean 0.3, variance p / (1 - p) * (0.01 + 0.04) = 0.05."""
    tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([0.1, 0.2])}})
    outputs = torch.stack([dare(tvs, rate=0.5, inner=average, seed=s)["w"].sum() for s in range(4000)]).double()
    assert outputs.mean().item() == pytest.approx(0.3, abs=4 * (0.05 / 4000) ** 0.5)
    assert outputs.var().item() == pytest.approx(0.05, abs=0.005)


def test_low_precision_checkpoints_are_drawn_and_rescaled_in_float32() -> None:
    half = {dtype: task_vectors({"w": torch.zeros(64).to(dtype)}, {"a": {"w": torch.ones(64).to(dtype)}})
            for dtype in (torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip
    drawn = {dtype: dare(tvs, rate=0.9)["w"] for dtype, tvs in half.items()}
    assert all(torch.equal(w, drawn[torch.float32]) for w in drawn.values())


def test_a_ties_trim_after_a_larger_drop_trims_nothing() -> None:
    """With 90 % dropped the threshold of "keep 20 %" is 0."""
    tvs = task_vectors({"w": torch.zeros(1000)}, {"a": {"w": uniform((1000,), "w") + 0.5}})
    dropped = drop_and_rescale(tvs, rate=0.9)
    assert torch.equal(trim(dropped, keep=0.2)["w"], dropped["w"])


@pytest.mark.parametrize("inner", [task_arithmetic, average, partial(ties, keep=0.5)])
def test_dare_is_its_steps_done_by_hand(inner: object) -> None:
    tvs = task_vectors({"w": torch.zeros(100)}, {t: {"w": uniform((100,), t) - 0.5} for t in "ab"})
    by_hand = inner(drop_and_rescale(tvs, rate=0.5, seed=7))["w"]  # type: ignore[operator]
    assert torch.equal(dare(tvs, rate=0.5, inner=inner, seed=7)["w"], by_hand)  # type: ignore[arg-type]


def test_dare_ties_with_a_trim_is_not_the_one_without() -> None:
    """The official code trims after dropping (here the default of `ties`); other tools elect without a trim."""
    tvs = task_vectors({"w": torch.zeros(100)}, {t: {"w": uniform((100,), t) - 0.5} for t in "ab"})
    trimmed = dare(tvs, rate=0.2, inner=partial(ties, keep=0.2))["w"]
    untrimmed = dare(tvs, rate=0.2, inner=partial(ties, keep=1.0))["w"]
    assert (trimmed != 0).sum() < (untrimmed != 0).sum()


@pytest.mark.parametrize("rate", [90, -0.1, 1.5, float("nan")])
def test_a_percentage_is_refused_in_a_plain_call_too(rate: float) -> None:
    with pytest.raises(UsageError, match=r"dare.rate must (lie in \[0, 1\]|be a finite number)"):
        dare(ones(4, "a"), rate=rate)


def test_two_algorithms_are_called_dare_ties() -> None:
    """Of five entries the trim keeps two (int(5 K) + 1 with K = 0.2); without it the election sees them all."""
    a, b = torch.tensor([5.0, -4, 3, 2, 1]), torch.tensor([-4.0, -5, 1, 2, 3])
    tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": a}, "b": {"w": b}})
    assert dare_ties(tvs, rate=0.0, keep=0.2)["w"].tolist() == [5, -4.5, 0, 0, 0]
    assert dare_ties(tvs, rate=0.0, keep=0.2, trimmed=False)["w"].tolist() == [5, -4.5, 2, 2, 2]


def test_dare_ties_is_its_steps_by_hand() -> None:
    tvs = ones(100, "a", "b")
    by_hand = ties(drop_and_rescale(tvs, rate=0.5, seed=7), keep=0.2, scale=0.5, combine="sum")
    assert torch.equal(dare_ties(tvs, rate=0.5, keep=0.2, scale=0.5, combine="sum", seed=7)["w"], by_hand["w"])


def test_drop_only_is_an_option_of_the_method() -> None:
    assert torch.unique(dare(ones(1000, "a"), rate=0.75, rescale=False, inner=average)["w"]).tolist() == [0, 1]


def test_dropping_by_magnitude_is_a_trim_of_every_tensor() -> None:
    """The ablation drops the int(n p) smallest of each tensor, and what is left is not rescaled."""
    base = {"u": torch.zeros(4), "v": torch.zeros(4)}
    tvs = task_vectors(base, {"a": {"u": torch.tensor([1.0, -2, 3, 4]), "v": torch.tensor([0.1, 0.2, -0.3, 0.4])}})
    kept = trim(tvs, keep=1 - 0.5, scope="tensor")
    assert kept["u"][0].tolist() == [0, 0, 3, 4]
    assert (kept["v"][0] != 0).tolist() == [False, False, True, True]
