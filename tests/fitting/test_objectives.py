"""Losses without labels."""

import math

import pytest
import torch

from calmerge.fitting import entropy, expert_kl, feature_distance, pseudo_label
from calmerge.tasks.base import Outputs


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_entropy_is_in_nats_and_not_normalised_by_the_number_of_classes(classes: int) -> None:
    assert entropy(torch.zeros(5, classes)).item() == pytest.approx(math.log(classes), abs=1e-6)


def test_entropy_is_positive_and_the_mean_over_examples() -> None:
    one, two = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert entropy(one).item() == pytest.approx(0.3653, abs=1e-4)
    assert entropy(torch.cat([one, two])).item() == pytest.approx((0.365335 + math.log(2)) / 2, abs=1e-5)


def test_entropy_falls_as_confidence_rises() -> None:
    """d H / d lambda of the logits (2 lambda, 0) at 0.3 is -2 * 0.6 * 0.2288; the wrong sign would be positive."""
    lam = torch.tensor(0.3, requires_grad=True)
    entropy(torch.stack([2 * lam, torch.zeros(())])[None]).backward()
    assert lam.grad.item() == pytest.approx(-0.2745, abs=1e-4)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_entropy_and_its_gradient_stay_finite_for_huge_logits(size: float) -> None:
    logits = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    loss = entropy(logits)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(logits.grad).all()


def test_pseudo_label_is_the_mean_cross_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    expected = (math.log(2) + math.log(1 + math.exp(1))) / 2
    assert pseudo_label(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, abs=1e-6)


def test_expert_kl_is_the_divergence_at_a_temperature() -> None:
    """Expert (3/4, 1/4), model (1/2, 1/2): KL = ln 2 - H(3/4) = 0.1308; at temperature 2 the logits are halved."""
    z = torch.tensor([[3.0, 1.0]]).log()
    assert expert_kl(torch.zeros(1, 2), z, temperature=1.0).item() == pytest.approx(0.13081, abs=1e-5)
    assert expert_kl(torch.zeros(1, 2), 2 * z, temperature=2.0).item() == pytest.approx(4 * 0.13081, abs=1e-4)


def test_expert_kl_is_zero_at_the_expert_whatever_is_added_to_its_logits() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0]])
    assert expert_kl(z + 5, z).item() == pytest.approx(0.0, abs=1e-6)


def test_feature_distance_is_relative_to_the_expert_s_features() -> None:
    expert = torch.tensor([[3.0, 4.0]])
    assert feature_distance(Outputs(torch.zeros(1, 2), torch.zeros(1, 2)), expert).item() == 1.0
    assert feature_distance(Outputs(torch.zeros(1, 2), torch.tensor([[3.0, 9.0]])), expert).item() == 1.0
