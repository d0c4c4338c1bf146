"""WUDI: the traps and worked checks of its specification."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, average, task_vectors, wudi
from calmerge._random import uniform
from calmerge.pieces.descend import adam
from calmerge.pieces.least_squares import gram_closed_form

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "wudi", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def numbers(*values: float) -> TaskVectors:
    return vectors(*[torch.tensor([[x]]) for x in values])


def disturbance(m: Tensor, tau: Tensor) -> float:
    return float(sum(((m - t) @ t.T).square().sum() / t.square().sum() for t in tau))


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"lr": "relative"}, {"solver": "closed_form"}])
def test_one_expert_comes_out_unchanged(options: dict[str, Any]) -> None:
    near(wudi(vectors(noise(4, 6)), **options)["w"], noise(4, 6))


@pytest.mark.parametrize("options", [{}, {"solver": "closed_form"}])
def test_orthogonal_row_spaces_give_the_sum(options: dict[str, Any]) -> None:
    tvs = vectors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    found = wudi(tvs, **options)["w"]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0]]), rtol=0, atol=1e-3)
    if not options:
        assert found.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("values", "expected"), [((1.0, 3.0), 3.9970), ((0.001, 0.003), 0.00218), ((1.0, -1.0), 0.0)])
def test_the_official_run_stops_early_and_its_step_is_absolute(values: tuple[float, ...], expected: float) -> None:
    torch.testing.assert_close(wudi(numbers(*values))["w"], torch.tensor([[expected]]), rtol=3e-3, atol=1e-7)


def test_a_relative_step_does_the_same_at_any_size() -> None:
    once, tenth = (wudi(numbers(c, 3 * c), lr="relative")["w"] for c in (1.0, 0.1))
    torch.testing.assert_close(once, 10 * tenth, rtol=1e-5, atol=0)


def test_the_closed_form_is_the_minimiser() -> None:
    near(wudi(numbers(1.0, 3.0), solver="closed_form")["w"], torch.tensor([[2.0]]))
    tvs = vectors(noise(4, 5, key=1), noise(4, 5, key=2))
    tau = tvs["w"]
    best = wudi(tvs, solver="closed_form", ridge=1e-9)["w"]
    least = disturbance(best, tau)
    assert least < disturbance(wudi(tvs)["w"], tau) < disturbance(tau.sum(0), tau)
    for i in range(20):
        assert disturbance(best + 1e-2 * noise(4, 5, key=("step", i)), tau) > least


def test_the_descent_s_gradient_is_that_of_the_disturbance() -> None:
    """Two steps of Adam, against autograd."""
    tau = torch.stack([noise(3, 4, key=1), noise(3, 4, key=2)])
    m = tau.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([m], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        sum(((m - t) @ t.T).square().sum() / t.square().sum() for t in tau).backward()  # type: ignore[union-attr]
        optimizer.step()
    near(wudi(vectors(*tau), steps=2, lr=0.01)["w"], m.detach())


def test_an_expert_without_update_is_left_out_not_nan() -> None:
    both = vectors(noise(3, 4, key=1), noise(3, 4, key=2))
    three = vectors(noise(3, 4, key=1), torch.zeros(3, 4), noise(3, 4, key=2))
    for solver in ("adam", "closed_form"):
        assert torch.equal(wudi(both, solver=solver)["w"], wudi(three, solver=solver)["w"])  # type: ignore[arg-type]


def test_other_tensors_are_averaged_or_left_at_the_base() -> None:
    tvs = task_vectors({"b": torch.zeros(2)}, {"x": {"b": torch.ones(2)}, "y": {"b": 3 * torch.ones(2)}})
    assert torch.equal(wudi(tvs)["b"], average(tvs)["b"])
    assert wudi(tvs, rest="base")["b"].tolist() == [0.0, 0.0]


def test_the_ridge_draws_to_the_experts_not_to_zero() -> None:
    delta, gram = noise(3, 4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    near(gram_closed_form([delta, delta], [gram, 2 * gram], ridge=0.5).float(), delta)


def test_adam_is_torch_s() -> None:
    start, target = noise(5), noise(5, key=1)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)
    for _ in range(20):
        optimizer.zero_grad()
        ((x - target) ** 2).sum().backward()
        optimizer.step()
    near(adam(start, lambda y: 2 * (y - target), lr=0.03, steps=20), x.detach())
    assert torch.equal(start, noise(5))
