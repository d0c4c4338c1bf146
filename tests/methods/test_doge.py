"""DOGE: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, add, doge, doge_vectors, task_vectors, ties
from calmerge._random import uniform
from calmerge.methods.doge import coefficients, shift

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
DIAGONAL = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "doge", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def loss(delta: Tensor, tau: Tensor, eta: float) -> Tensor:
    merged = (coefficients(tau, eta)[:, None, None] * (tau + delta)).sum(0)
    return (tau * (tau - merged)).sum(2).square().sum()


def first_gradient(tau: Tensor, eta: float) -> Tensor:
    """What the descent sees first: after one step Adam's move is lr times its sign, so it is taken by autograd here."""
    delta = torch.zeros_like(tau[0], requires_grad=True)
    loss(delta, tau, eta).backward()
    assert delta.grad is not None
    return delta.grad


def test_coefficients_give_every_task_the_same_norm() -> None:
    near(coefficients(DIAGONAL, 0.5), torch.tensor([1 / 6, 1 / 8]))


def test_the_worked_loss_and_gradient() -> None:
    assert loss(torch.zeros(2, 2), DIAGONAL, 0.5).item() == pytest.approx(252.25)
    near(first_gradient(DIAGONAL, 0.5), torch.tensor([[-13.125, 0.0], [0.0, -32.66667]]))


def test_the_inner_product_is_per_row_not_of_the_whole_tensor() -> None:
    tau = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert loss(torch.zeros(2, 2), tau, 0.5).item() == pytest.approx(11.0832, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_descent_is_adam_on_projected_gradients(steps: int) -> None:
    tau = torch.stack([noise(6, 8, key=1), noise(6, 8, key=2)])
    u = torch.cat([torch.linalg.svd(t)[0][:, :3] for t in tau], 1)
    shared = torch.linalg.svd(u)[0][:, :3]
    delta = torch.zeros(6, 8, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(delta, tau, 0.07).backward()
        assert delta.grad is not None
        delta.grad -= shared @ (shared.T @ delta.grad)
        optimizer.step()
    near(shift(tau, eta=0.07, subspace=2, lr=0.01, steps=steps), delta.detach())


def test_delta_enters_the_subspace_though_its_gradients_do_not() -> None:
    """Adam rescales entries after the projection; the official code has it so, and this is not 'fixed'."""
    tau = torch.stack([noise(12, 8, key=1), noise(12, 8, key=2)])
    u = torch.cat([torch.linalg.svd(t)[0][:, :4] for t in tau], 1)
    shared = torch.linalg.svd(u)[0][:, :4]
    delta = shift(tau, eta=0.07, subspace=2, lr=1e-4, steps=1)
    assert (shared.T @ delta).norm() > 0.1 * delta.norm()


def test_the_rank_is_divided_by_subspace_and_may_leave_nothing() -> None:
    tau = torch.stack([noise(4, 4, key=1), noise(4, 4, key=2)])
    assert not torch.equal(*(shift(tau, eta=0.07, subspace=s, lr=0.01, steps=2) for s in (1, 4)))
    free = shift(tau, eta=0.07, subspace=5, lr=0.01, steps=1)  # floor(4 / 5) = 0 directions
    near(free, -0.01 * first_gradient(tau, 0.07).sign())


def test_a_task_without_update_has_no_weight() -> None:
    merged = doge(vectors(noise(4, 4), torch.zeros(4, 4)), steps=3)["w"]
    assert merged.isfinite().all()
    near(doge(vectors(noise(4, 4), torch.zeros(4, 4)), steps=0, keep=1.0)["w"], 0.07 * noise(4, 4) / noise(4, 4).norm())


def mixed() -> TaskVectors:
    shapes = {"one.weight": (4, 6), "two.weight": (3, 5), "norm.weight": (6,), "norm.bias": (6,)}
    experts = {t: {n: noise(*s, key=(t, n)) for n, s in shapes.items()} for t in "abc"}
    return task_vectors({n: 0.1 * noise(*s, key=n) for n, s in shapes.items()}, experts)


def test_biases_and_norms_are_the_base_s_bit_for_bit() -> None:
    tvs = mixed()
    merged = add(tvs.base, doge(tvs, steps=2))
    assert all(torch.equal(merged[n], tvs.base[n]) for n in ("norm.weight", "norm.bias"))
    near(doge(tvs, steps=0, rest="mean")["norm.bias"], tvs["norm.bias"].mean(0))


def test_without_steps_and_trimming_it_sums_vectors_of_equal_norm() -> None:
    tvs = mixed()
    merged = doge(tvs, steps=0, keep=1.0)
    for n in ("one.weight", "two.weight"):
        near(merged[n], sum(0.07 * t / t.norm() for t in tvs[n]))


def test_the_mask_is_global_over_matrices_and_of_the_vectors_before_the_shift() -> None:
    tvs = mixed()
    before, after = doge_vectors(tvs, steps=0, keep=0.3), doge_vectors(tvs, steps=50, lr=0.01, keep=0.3)
    tau = torch.cat([tvs[n].flatten(1) for n in ("one.weight", "two.weight")], 1)
    cut = tau.abs().kthvalue(39 - 11, dim=1).values  # 39 entries, int(39 * 0.3) = 11 above the cut, which stays too
    for n in ("one.weight", "two.weight"):
        kept = tvs[n].abs() >= cut[:, None, None]
        assert torch.equal(before[n], tvs[n].where(kept, 0.0))
        assert torch.equal(after[n] != 0, kept)
        assert not torch.equal(after[n], before[n])
    assert torch.equal(after["norm.bias"], tvs["norm.bias"])


def test_doge_before_ties_is_the_steps_by_hand() -> None:
    tvs = mixed()
    moved = {n: tvs[n] + shift(tvs[n], eta=0.07, subspace=6, lr=0.01, steps=5) for n in ("one.weight", "two.weight")}
    by_hand = task_vectors(
        {n: torch.zeros(tvs.specs[n].shape) for n in tvs},
        {t: {n: moved.get(n, tvs[n])[i] for n in tvs} for i, t in enumerate(tvs.tasks)},
    )
    composed = ties(doge_vectors(tvs, keep=1.0, lr=0.01, steps=5), keep=0.4)
    expected = ties(by_hand, keep=0.4)
    assert all(torch.equal(composed[n], expected[n]) for n in tvs)
