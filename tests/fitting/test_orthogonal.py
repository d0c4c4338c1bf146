"""Muon for matrices and Adam for the rest, as one optimizer."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calmerge import Run, StateDict
from calmerge.fitting.fit import cosine, fit
from calmerge.fitting.orthogonal import Orthogonal


def stepped(gradient: Tensor, *, matrix: bool, lr: float) -> Tensor:
    p = torch.zeros_like(gradient, requires_grad=True)
    optim = Orthogonal([p], [matrix], lr=lr)
    p.grad = gradient.clone()
    optim.step()
    return p.detach()


def test_all_directions_of_a_matrix_move_alike_whatever_their_gradients() -> None:
    moved = stepped(torch.diag(torch.tensor([100.0, 10.0, 1.0, 1.0])), matrix=True, lr=0.1)
    sizes = torch.linalg.svdvals(moved)
    assert sizes.max() / sizes.min() < 2  # five steps of Newton and Schulz make singular values of 0.7 to 1.2


def test_what_is_no_matrix_moves_as_with_adam() -> None:
    gradient = torch.tensor([[100.0, -1.0]])
    torch.testing.assert_close(stepped(gradient, matrix=False, lr=0.1), torch.tensor([[-0.1, 0.1]]))


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_a_fifth_of_the_step_size_is_the_root_mean_square_of_a_full_update(shape: tuple[int, int]) -> None:
    moved = stepped(torch.eye(*shape), matrix=True, lr=0.1)  # a gradient with all singular values 1
    assert moved.square().mean().sqrt() == pytest.approx(0.02, rel=0.3)


def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    base, goal = StateDict({"w": torch.zeros(3, 3), "b": torch.zeros(3)}), torch.arange(9.0).reshape(3, 3)

    def gradient(theta: dict[str, Tensor], step: int) -> dict[str, float]:
        ((theta["w"] - goal).square().sum() + (theta["b"] - 1).square().sum()).backward()
        return {"toy": 0.0}

    def fitted(steps: int, run: Run | None) -> dict[str, Tensor]:
        return fit(
            lambda p: StateDict(dict(p)), dict(base), gradient, base=base, steps=steps, run=run, schedule=cosine(6),
            optimizer=partial(Orthogonal, matrices=[True, False], lr=0.1),
        ).params  # fmt: skip

    fitted(2, Run(folder=tmp_path))
    again, whole = fitted(6, Run(folder=tmp_path)), fitted(6, None)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
