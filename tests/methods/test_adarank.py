"""AdaRank: the sheet's checks and traps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from calmerge import Run, StateDict, adarank, average, cart, task_arithmetic, task_vectors
from calmerge.fitting.gates import singular_gates, straight_through

EXPERTS = {
    "a": {"w": torch.diag(torch.tensor([3.0, 1.0])), "b": torch.tensor([1.0, 0.0])},
    "b": {"w": torch.diag(torch.tensor([0.5, 2.0])), "b": torch.tensor([0.0, 2.0])},
}
NOTHING = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}


def gates(folder: Path, keep: float) -> Any:
    return singular_gates(StateDict(NOTHING), task_vectors(NOTHING, EXPERTS), folder, keep=keep, coefficient=0.3)


def test_all_components_are_task_arithmetic(tmp_path: Path) -> None:
    found = gates(tmp_path, 1.0)
    delta, plain = found.merged(found.start), task_arithmetic(task_vectors(NOTHING, EXPERTS))
    for name in plain:
        torch.testing.assert_close(delta[name], plain[name])


def test_the_first_components_are_truncated_task_arithmetic(tmp_path: Path) -> None:
    found = gates(tmp_path, 0.5)
    delta = found.merged(found.start)
    torch.testing.assert_close(delta["w"], 0.3 * torch.diag(torch.tensor([3.0, 2.0])))


def test_tensors_that_are_no_matrices_have_a_coefficient_only(tmp_path: Path) -> None:
    found = gates(tmp_path, 0.5)
    assert sorted(found.start) == ["coefficients/b", "coefficients/w", "gates/w"]
    torch.testing.assert_close(found.merged(found.start)["b"], torch.tensor([0.3, 0.6]))


def test_the_gate_is_hard_forward_and_soft_backward() -> None:
    """For s = 2 and logit 0.1 the value is 2; the gradient to p is s, so to the logit s p (1 - p) / 10."""
    logit = torch.tensor([0.1], requires_grad=True)
    value = 2.0 * straight_through(logit)
    assert value.item() == 2.0
    value.backward()
    p = torch.sigmoid(torch.tensor(0.01))
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx((2 * p * (1 - p) / 10).item())


def test_a_closed_gate_can_open(tmp_path: Path) -> None:
    """The straight-through gradient reaches components whose gate is 0."""
    found = gates(tmp_path, 0.5)
    params = {n: p.clone().requires_grad_() for n, p in found.start.items()}
    found.merged(params)["w"].sum().backward()
    assert (params["gates/w"].grad != 0).all()


def test_no_update_from_the_average_is_cart(toy: Any) -> None:
    ours = adarank(toy.tvs, tasks=toy.tasks, steps=0, keep=0.5, coefficient=1.5)
    plain = cart(toy.tvs, keep=0.5, scale=1.5)
    mean = average(toy.tvs)
    for name in ours:
        if ours[name].dim() == 2:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(ours[name], mean[name], rtol=1e-4, atol=1e-5)  # deviations sum to 0


def test_no_update_from_the_base_is_task_arithmetic(toy: Any) -> None:
    ours, plain = adarank(toy.tvs, tasks=toy.tasks, start="base", steps=0), task_arithmetic(toy.tvs)
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)


def test_the_entropy_falls(toy: Any) -> None:
    run = Run()
    adarank(toy.tvs, tasks=toy.tasks, steps=40, lr=0.02, batch=30, run=run)
    loss = run.trace["adarank"].loss
    assert loss[-1] < loss[0]
