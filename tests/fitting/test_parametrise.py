"""What a fit may move: every parametrisation begins at its start, and its gradient is autograd's."""

from typing import Any

import pytest
import torch

from calmerge import StateDict, task_vectors
from calmerge.fitting.parametrise import (
    Parametrisation,
    element_coefficients,
    element_masks,
    layer_coefficients,
    reach,
    span,
)

BASE = {"w": torch.zeros(3), "b": torch.zeros(())}
EXPERTS = {
    "one": {"w": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor(1.0)},
    "two": {"w": torch.tensor([3.0, 2.0, 0.0]), "b": torch.tensor(-1.0)},
}
START = StateDict({"w": torch.tensor([0.5, 0.5, 0.5]), "b": torch.tensor(2.0)})


def parametrisations() -> dict[str, Parametrisation]:
    tvs = task_vectors(BASE, EXPERTS)
    return {
        "layer_coefficients": layer_coefficients(START, tvs),
        "element_coefficients": element_coefficients(START, tvs),
        "element_masks": element_masks(START, tvs, logit=80.0),
        "span": span(START, reach(tvs)),
    }


@pytest.mark.parametrize("name", parametrisations())
def test_a_fit_begins_at_its_start(name: str) -> None:
    found = parametrisations()[name]
    delta = found.merged(found.start)
    for tensor in START:
        torch.testing.assert_close(delta[tensor], START[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", parametrisations())
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    found = parametrisations()[name]
    torch.manual_seed(0)
    params = {n: 0.1 * torch.rand_like(p.double()) for n, p in found.start.items()}
    assert torch.autograd.gradcheck(
        lambda w, b: tuple(found.merged({"w": w, "b": b})[n].double() for n in ("w", "b")),
        (params["w"].requires_grad_(), params["b"].requires_grad_()),
        eps=1e-2,
        atol=1e-2,
    )


def test_layer_coefficients_add_multiples_of_whole_task_vectors() -> None:
    found = parametrisations()["layer_coefficients"].merged({"w": torch.tensor([1.0, 0.5]), "b": torch.zeros(2)})
    assert found["w"].tolist() == [3.0, -0.5, 0.5]
    assert found["b"].item() == 2.0


def test_element_coefficients_choose_for_each_entry() -> None:
    c = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    found = parametrisations()["element_coefficients"].merged({"w": c, "b": torch.zeros(2)})
    assert found["w"].tolist() == [1.5, 2.5, 0.5]


def test_an_element_mask_goes_from_the_start_to_the_task() -> None:
    tvs = task_vectors(BASE, EXPERTS).only(["two"])
    found = element_masks(START, tvs).merged({"w": torch.tensor([[0.0, 99.0, -99.0]]), "b": torch.zeros(1)})
    assert found["w"].tolist() == [1.75, 2.0, 0.5]


def test_span_moves_no_entry_that_no_expert_moved() -> None:
    tvs = task_vectors(BASE, EXPERTS)
    u = {"w": torch.tensor([0.5, -0.25, 7.0]), "b": torch.tensor(0.0)}
    assert reach(tvs)["w"].tolist() == [4.0, 4.0, 0.0]
    assert span(START, reach(tvs)).merged(u)["w"].tolist() == [2.5, -0.5, 0.5]


def test_span_stops_at_its_limit() -> None:
    far = {"w": torch.full((3,), 9.0), "b": torch.tensor(-9.0)}
    found = span(START, reach(task_vectors(BASE, EXPERTS)), limit=0.5).merged(far)
    assert found["w"].tolist() == [2.5, 2.5, 0.5]
    assert found["b"].item() == 1.0


def test_nothing_of_the_size_of_all_experts_is_kept(toy: Any) -> None:
    """The experts stay lazy: parameters of `span` are as many as the merged entries."""
    tvs = toy.tvs
    start = tvs.of("a")
    found = span(start, reach(tvs))
    assert sum(p.numel() for p in found.start.values()) == tvs.numel
