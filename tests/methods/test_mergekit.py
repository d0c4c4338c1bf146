"""mergekit's rules where they are not the papers': one test for each, and its random methods in the mean."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, get_origin

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calmerge import TaskVectors, UsageError, Weights, add, task_vectors, ties
from calmerge._random import uniform
from calmerge._signature import options_of
from calmerge.methods.mergekit import MERGEKIT_METHODS

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
NAMES = """
arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock multislerp
nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties
"""
near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def vectors(*rows: Any, base: Any = None) -> TaskVectors:
    tensors = [torch.tensor(r) if isinstance(r, list) else r for r in rows]
    start = torch.zeros_like(tensors[0]) if base is None else torch.tensor(base)
    return task_vectors({"w": start}, {f"t{i}": {"w": start + t} for i, t in enumerate(tensors)})


def delta(method: str, tvs: TaskVectors, **options: Any) -> Tensor:
    return MERGEKIT_METHODS[method](tvs, **options)["w"]


def test_all_twenty_are_there() -> None:
    assert list(MERGEKIT_METHODS) == NAMES.split()


@pytest.mark.parametrize("method", NAMES.split())
def test_numbers_for_each_model_are_sequences_and_others_are_not(method: str) -> None:
    each = {"weight", "density", "gamma", "scale"} | ({"epsilon"} if method.startswith("della") else set())
    for option in options_of(MERGEKIT_METHODS[method]).values():
        assert (get_origin(option.hint) is Sequence) == (option.name in each)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "multislerp", "nuslerp"])
def test_as_many_numbers_as_models_or_one(method: str) -> None:
    tvs = vectors([1.0, 0.0], [0.0, 1.0])
    assert torch.equal(delta(method, tvs, weight=[0.7]), delta(method, tvs, weight=[0.7, 0.7]))
    with pytest.raises(UsageError, match=rf"{method}.weight must hold one number, or one for .* 2 models .*, got 3\."):
        delta(method, tvs, weight=[1.0, 2.0, 3.0])


# linear, task_arithmetic ------------------------------------------------------------------------------------


def test_weights_that_do_not_sum_to_one_shrink_the_base_too() -> None:
    tvs = vectors([1.0], [3.0], base=[2.0])
    assert delta("linear", tvs, weight=[0.25, 0.5], normalize=False).tolist() == [0.25 * 3 + 0.5 * 5 - 2]
    near(delta("linear", tvs, weight=[0.25, 0.5]), torch.tensor([7 / 3]))


def test_linear_over_zeros_is_linear_over_any_base() -> None:
    x = [uniform((5,), i) for i in range(3)]
    base = uniform((5,), "base")
    options: dict[str, Any] = {"weight": [0.6, -0.3, 0.45], "normalize": False}
    over = task_vectors({"w": base}, {str(i): {"w": t} for i, t in enumerate(x)})
    near(delta("linear", over, **options) + base, delta("linear", vectors(*x), **options))


def test_weights_that_cancel_divide_by_one() -> None:
    assert delta("task_arithmetic", vectors([2.0], [6.0]), weight=[0.5, -0.5], normalize=True).tolist() == [-2.0]


def test_lambda_multiplies_the_normalised_sum() -> None:
    assert delta("task_arithmetic", vectors([2.0], [6.0]), weight=[1.0], normalize=True, lambda_=0.5).tolist() == [2.0]


# ties -------------------------------------------------------------------------------------------------------

ONE = {"A": torch.tensor([0.9, 0.8, -0.7, 0.6, 0.05]), "B": torch.tensor([0.04, -0.03, 0.02, 0.01, 0.0])}
TWO = {"A": torch.tensor([-0.1, 0.5, -0.4, 0.02, 0.3]), "B": torch.tensor([-0.2, 0.01, 0.03, -0.04, 0.05])}


def test_every_tensor_is_trimmed_to_exactly_its_share() -> None:
    """The official threshold over the whole model keeps three entries of A and none of B."""
    zero = {"A": torch.zeros(5), "B": torch.zeros(5)}
    tvs = task_vectors(zero, {"one": ONE, "two": TWO})
    merged = MERGEKIT_METHODS["ties"](tvs, weight=[1.0], density=[0.2])
    near(merged["A"], torch.tensor([0.9, 0.5, 0, 0, 0]))
    near(merged["B"], torch.tensor([-0.2, 0, 0, 0, 0]))


def test_at_least_one_entry_stays_unless_the_density_is_zero() -> None:
    assert delta("ties", vectors([3.0, -1.0, 2.0]), weight=[1.0], density=[1e-4]).tolist() == [3.0, 0.0, 0.0]
    assert delta("ties", vectors([3.0, -1.0, 2.0]), weight=[1.0], density=[0.0]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_of_zero_counts_as_plus(sign: float) -> None:
    """The official code takes the majority sign of the whole model: minus in the second case."""
    rows = [[sign * x for x in row] for row in ([1.0, 2.0, 3.0, 0.1, 0.0], [-1.0, 2.0, 3.0, 0.1, 0.0])]
    assert delta("ties", vectors(*rows), weight=[1.0], density=[0.6])[0] == 1.0
    assert ties(vectors(*rows), keep=0.6)["w"][0] == sign


def test_weights_count_before_the_vote() -> None:
    tvs = vectors([1.0], [-2.0])
    assert delta("ties", tvs, weight=[1.0, 1.0]).tolist() == [-2.0]
    assert delta("ties", tvs, weight=[3.0, 1.0]).tolist() == [1.0]


def test_one_divides_by_the_weights_of_those_that_agree() -> None:
    near(delta("ties", vectors([1.0], [4.0], [-1.0]), weight=[0.5, 0.25, 0.5]), torch.tensor([1.5 / 0.75]))
    tvs = vectors([1.0], [4.0], [-1.0])
    assert delta("ties", tvs, weight=[0.5, 0.25, 0.5], normalize=False).tolist() == [1.5]


def test_an_entry_of_zero_neither_agrees_nor_counts() -> None:
    assert delta("ties", vectors([2.0], [0.0]), weight=[1.0]).tolist() == [2.0]


def test_a_negative_weight_votes_against() -> None:
    assert delta("ties", vectors([2.0], [1.0]), weight=[-1.0, 1.0], normalize=False).tolist() == [-2.0]


def test_agreeing_weights_that_sum_to_zero_divide_by_one() -> None:
    """A negative delta with a negative weight agrees with plus: 0.5 * 2 + -0.5 * -2, weights 0."""
    assert delta("ties", vectors([2.0], [-2.0]), weight=[0.5, -0.5]).tolist() == [2.0]


def test_rescale_restores_the_l1_norm_of_each_tensor() -> None:
    merged = delta("ties", vectors([4.0, 2.0, -1.0, 1.0]), weight=[1.0], density=[0.5], rescale=True)
    near(merged, torch.tensor([16 / 3, 8 / 3, 0, 0]))


# dare -------------------------------------------------------------------------------------------------------


def test_the_l1_norm_is_restored_exactly_not_in_the_mean() -> None:
    merged = delta("dare_linear", vectors(torch.ones(10_000)), weight=[1.0], density=[0.1])
    assert merged.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert merged.max() != pytest.approx(10.0, abs=1e-3)  # what dividing by the density would give


def test_a_density_of_one_draws_nothing_and_of_zero_leaves_nothing() -> None:
    tvs = vectors([1.0, 2.0], [4.0, 8.0])
    for method in ("dare_linear", "dare_ties"):
        assert delta(method, tvs, weight=[1.0], density=[1.0, 0.0]).tolist() == [1.0, 2.0]


def test_dare_ties_votes_without_a_trim_and_does_not_divide() -> None:
    assert delta("dare_ties", vectors([1.0, 0.01], [2.0, 0.01]), weight=[0.5]).tolist() == [1.5, pytest.approx(0.01)]


def test_without_rescale_entries_stay_as_they_are() -> None:
    merged = delta("dare_linear", vectors(torch.full((50,), 3.0)), weight=[1.0], density=[0.5], rescale=False)
    assert merged.unique().tolist() == [0.0, 3.0]


# breadcrumbs ------------------------------------------------------------------------------------------------

CRUMBS = [9.0, -8.0, 7.0, -6.0, 5.0, -4.0, 3.0, -2.0, 1.0, -0.5]


def test_the_largest_go_and_exactly_the_share_stays() -> None:
    merged = delta("breadcrumbs", vectors(CRUMBS), weight=[1.0], density=[0.3], gamma=[0.2])
    assert merged.tolist() == [0, 0, 7, -6, 5, 0, 0, 0, 0, 0]


def test_fewer_of_the_largest_go_where_too_few_would_stay() -> None:
    merged = delta("breadcrumbs", vectors(CRUMBS), weight=[1.0], density=[0.9], gamma=[0.3])
    assert merged.tolist() == [0, *CRUMBS[1:]]


def test_a_small_tensor_loses_no_large_entry() -> None:
    """With int(gamma n) = 0 older versions left nothing of tensors under 100 entries."""
    merged = delta("breadcrumbs", vectors(CRUMBS), weight=[1.0], density=[0.2])
    assert merged.tolist() == [9, -8, 0, 0, 0, 0, 0, 0, 0, 0]


def test_equal_magnitudes_at_both_cuts_leave_the_exact_number() -> None:
    merged = delta("breadcrumbs", vectors(torch.ones(1000)), weight=[1.0], density=[0.3], gamma=[0.1])
    assert int((merged != 0).sum()) == 300


def test_breadcrumbs_ties_votes() -> None:
    tvs = vectors([9.0, 3.0, 1.0], [9.0, -4.0, 1.0])
    options: Mapping[str, Any] = {"weight": [1.0], "density": [0.34], "gamma": [0.34]}
    assert delta("breadcrumbs_ties", tvs, **options).tolist() == [0.0, -4.0, 0.0]
    assert delta("breadcrumbs", tvs, **options).tolist() == [0.0, -1.0, 0.0]


# della ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.5, 0.6)])
def test_both_ends_of_the_chances_must_lie_between_0_and_1(density: float, epsilon: float) -> None:
    with pytest.raises(UsageError, match=r"della: chances from .* follow from density .*; they must lie in \(0, 1\)"):
        delta("della", vectors([1.0]), weight=[1.0], density=[density], epsilon=[epsilon])


def test_epsilon_does_not_matter_where_nothing_is_drawn() -> None:
    assert delta("della", vectors([1.0, 2.0]), weight=[0.3], density=[1.0], epsilon=[0.9]).tolist() == [1.0, 2.0]


# model_stock, ram, passthrough ------------------------------------------------------------------------------


def test_model_stock_is_drawn_to_the_base_by_the_angle() -> None:
    near(delta("model_stock", vectors([1.0, 0.0], [0.5, sqrt(3) / 2])), torch.tensor([0.5, sqrt(3) / 6]))
    near(delta("model_stock", vectors([1.0, 2.0], [1.0, 2.0])), torch.tensor([1.0, 2.0]))
    near(delta("model_stock", vectors([1.0, 0.0], [0.0, 1.0])), torch.zeros(2))


def test_negative_cosines_extrapolate() -> None:
    """cos = -1/2 of two: t = -1 / (1 - 1/2) = -2."""
    near(delta("model_stock", vectors([1.0, 0.0], [-0.5, sqrt(3) / 2])), -2 * torch.tensor([0.25, sqrt(3) / 4]))


def test_opposite_models_leave_the_base() -> None:
    assert delta("model_stock", vectors([1.0, 0.0], [-1.0, 0.0])).tolist() == [0.0, 0.0]


def test_filter_wise_has_an_angle_for_each_row() -> None:
    one, two = [[1.0, 0.0], [1.0, 2.0]], [[0.0, 1.0], [1.0, 2.0]]
    near(delta("model_stock", vectors(one, two), filter_wise=True), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))


def test_one_model_has_no_angle() -> None:
    with pytest.raises(UsageError, match="mergekit_model_stock needs the angle between two or more models, got 1"):
        delta("model_stock", vectors([1.0]))


def test_ram_takes_mergekit_s_names() -> None:
    tvs = vectors([1.0, 0.0, 2.0], [0.0, 3.0, 4.0])
    assert delta("ram", tvs, epsilon=1e-5).tolist() == [1.0, 3.0, 3.0]
    near(delta("ramplus_tl", tvs, r=0.1, alpha=0.2, epsilon=1e-5), torch.tensor([1.02, 3.06, 3.0]))
    assert delta("ram", tvs, epsilon=1.0).tolist() == [0.0, 3.0, 3.0]


def test_passthrough_scales_the_weights_not_the_delta() -> None:
    tvs = vectors([1.0], base=[3.0])
    for scale, expected in ((1.0, 4.0), (0.0, 0.0), (0.5, 2.0)):
        assert add(tvs.base, MERGEKIT_METHODS["passthrough"](tvs, scale=[scale]))["w"].tolist() == [expected]


# The random methods -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "statistics.json").read_text()), load_file(GOLDEN / "statistics.safetensors")


@pytest.mark.parametrize(
    "case",
    ["dare_linear_one_expert", "dare_linear_two_experts", "dare_ties_one_expert", "dare_ties_two_experts",
     "della_linear_one_expert", "della_one_expert", "della_two_experts"],
)  # fmt: skip
def test_draws_have_mergekit_s_mean_and_norm(case: str, measured: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    described, tensors = measured[0][case], measured[1]
    names = list(described["tensors"])
    experts = {m: {n: tensors[f"{m}/{n}"] for n in names} for m in described["models"]}
    tvs = task_vectors({n: tensors[f"base/{n}"] for n in names}, experts)
    options = {k: [v] if k in ("density", "epsilon") else v for k, v in described["parameters"].items()}
    method: Callable[..., Weights] = partial(MERGEKIT_METHODS[described["method"]], tvs, **options)
    runs = 100
    merged = [method(seed=seed) for seed in range(runs)]
    for name, facts in described["tensors"].items():
        draws = torch.stack([one[name].double() for one in merged])
        mean, std = (tensors[f"{case}/{name}/{what}"].double() for what in ("mean", "std"))
        error = std * (1 / runs + 1 / facts["runs"]) ** 0.5
        off = (draws.mean(0) - mean).abs() > described["tolerance"]["mean_standard_errors"] * error + 1e-7
        assert off.double().mean() <= 0.001
        if len(experts) == 1:
            norms = draws.flatten(1).abs().sum(1)
            assert ((norms / facts["input_l1"][0] - 1).abs() < described["tolerance"]["output_l1_rtol"]).all()
            kept = (draws != 0).flatten(1).sum(1) / facts["nonzero_entries"]
            spread = facts["kept_fraction_std"] * (1 / runs + 1 / facts["runs"]) ** 0.5
            assert abs(float(kept.mean()) - facts["kept_fraction_mean"]) <= 6 * spread
