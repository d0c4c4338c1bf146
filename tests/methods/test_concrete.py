"""Concrete masks and the methods built on them: the sheet's checks and traps, and FusionBench's mask."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from calmerge import Run, concrete_adamerging, concrete_task_arithmetic, task_arithmetic, task_vectors
from calmerge.fitting import entropy
from calmerge.fitting.concrete import concrete_mask, final_masks, masked, noise

GOLDEN = Path(__file__).parents[1] / "golden" / "fusion_bench" / "concrete_mask"


def test_half_everywhere_gives_plain_task_arithmetic() -> None:
    mask = concrete_mask(torch.zeros(4), torch.full((4,), 0.5))
    assert mask.tolist() == [1.0] * 4


def test_the_mask_of_the_worked_example() -> None:
    mask = concrete_mask(torch.zeros(2), torch.tensor([0.9, 0.1]))
    assert mask.tolist() == pytest.approx([1.97561, 0.02439], abs=1e-5)


def test_a_large_constant_opens_the_mask() -> None:
    u = torch.tensor([0.9, 0.1])
    assert concrete_mask(torch.full((2,), 30.0), u).tolist() == pytest.approx([1.0, 1.0])


def test_a_tensor_of_one_entry_always_has_mask_one() -> None:
    assert concrete_mask(torch.tensor([-3.0]), torch.tensor([0.01])).item() == pytest.approx(1.0)


def test_the_mask_is_scaled_by_tensor_and_not_over_the_model() -> None:
    masks = final_masks(
        {"mask/a": torch.tensor([5.0, 5.0]), "mask/b": torch.tensor([-5.0, -5.0])},
        temperature=0.5,
        evaluation="expected",
        seed=0,
    )
    assert masks["a"].tolist() == pytest.approx([1.0, 1.0])
    assert masks["b"].tolist() == pytest.approx([1.0, 1.0])


def test_one_mask_is_shared_by_all_experts() -> None:
    tau = {"w": torch.tensor([1.0, 2.0])}
    tvs = masked(task_vectors({"w": torch.zeros(2)}, {"a": tau, "b": tau}), {"w": torch.tensor([0.5, 1.5])})
    assert tvs["w"].tolist() == [[0.5, 3.0], [0.5, 3.0]]


def test_the_base_is_not_masked(toy: Any) -> None:
    toy.experts = {t: {n: w.clone() for n, w in toy.base.items()} for t in toy.experts}
    delta = concrete_task_arithmetic(toy.tvs, tasks=toy.tasks, steps=3, batch=8)
    assert all(not delta[n].any() for n in delta)


def test_noise_never_reaches_0_or_1() -> None:
    u = noise(torch.zeros(100_000), 0, "w")
    assert u.min() > 0
    assert u.max() < 1
    assert torch.isfinite(u.logit()).all()


def test_no_update_and_the_expected_mask_is_task_arithmetic(toy: Any) -> None:
    delta = concrete_task_arithmetic(toy.tvs, tasks=toy.tasks, steps=0, evaluation="expected")
    plain = task_arithmetic(toy.tvs)
    for n in delta:
        torch.testing.assert_close(delta[n], plain[n])


def test_the_final_draw_is_decided_by_the_seed(toy: Any) -> None:
    draws = [concrete_task_arithmetic(toy.tvs, tasks=toy.tasks, steps=0, seed=s)["fc1.weight"] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_logits_move_down_the_entropy(toy: Any) -> None:
    run = Run()
    concrete_task_arithmetic(toy.tvs, tasks=toy.tasks, steps=60, lr=0.1, batch=30, run=run)
    loss = run.trace["concrete_task_arithmetic"].loss
    assert sum(loss[-10:]) < sum(loss[:10])


def test_task_wise_phase_two_can_be_skipped(toy: Any) -> None:
    run = Run()
    concrete_adamerging(toy.tvs, tasks=toy.tasks, per="task", mask_steps=2, steps=0, batch=8, run=run)
    assert run.trace["concrete_adamerging"].loss == []


def test_coefficients_are_reset_before_every_inner_step(toy: Any) -> None:
    """With a mask that cannot move (lr 0 is refused, so tiny) the second phase starts from `init`."""
    run = Run()
    concrete_adamerging(
        toy.tvs, tasks=toy.tasks, per="task", init=0.25, mask_steps=3, mask_lr=1e-9, steps=0, batch=8, run=run
    )
    assert run.trace["concrete_adamerging"].coefficients.values == [[0.25] * 4]


def test_the_masks_are_fitted_beside_coefficients_of_the_kind_asked_for(toy: Any) -> None:
    """An inner step of its own for every tensor, or one for all tensors of a task, is another place to fit masks at."""
    options = {"mask_steps": 3, "mask_lr": 0.1, "inner_lr": 0.5, "steps": 0, "batch": 8, "evaluation": "expected"}
    by_tensor, by_task = (
        concrete_adamerging(toy.tvs, tasks=toy.tasks, per=per, **options) for per in ("tensor", "task")
    )
    assert not torch.equal(by_tensor["fc1.weight"], by_task["fc1.weight"])


@pytest.mark.usefixtures("save_always")
def test_an_interrupted_fit_goes_on_to_the_same_masks(toy: Any, tmp_path: Path) -> None:
    """The inner optimizer's state is kept across updates, so it must be kept across an interruption."""
    options = {"tasks": toy.tasks, "mask_lr": 0.05, "steps": 0, "batch": 8}
    whole = concrete_adamerging(toy.tvs, mask_steps=4, **options)

    class Interrupted(KeyboardInterrupt):
        pass

    calls = []
    plain = type(toy.tasks.model).logits

    def flaky(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 18:  # in the third of four updates, which take eight forward passes each
            raise Interrupted
        return plain(*args)

    type(toy.tasks.model).logits = flaky
    try:
        with pytest.raises(Interrupted):
            concrete_adamerging(toy.tvs, mask_steps=4, **options, run=Run(tmp_path))
    finally:
        type(toy.tasks.model).logits = plain
    again = concrete_adamerging(toy.tvs, mask_steps=4, **options, run=Run(tmp_path))
    assert all(torch.equal(whole[n], again[n]) for n in whole)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return out


def test_mask_merge_and_gradient_are_those_of_fusion_bench() -> None:
    case = json.loads((GOLDEN / "case.json").read_text())
    given, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "output.safetensors")
    part = lambda d, p: {n.removeprefix(p): w for n, w in d.items() if n.startswith(p)}  # noqa: E731
    logits = {n: x.requires_grad_() for n, x in part(given, "logits/").items()}
    masks = {n: concrete_mask(x, given[f"uniform/{n}"], temperature=0.5) for n, x in logits.items()}
    tvs = task_vectors(part(given, "base/"), {str(t): part(given, f"expert_{t}/") for t in (1, 2, 3)})
    delta = task_arithmetic(masked(tvs, masks), scale=0.3)
    merged = {n: tvs.base[n] + delta[n] for n in tvs}
    for n in masks:
        torch.testing.assert_close(masks[n], stored[f"rescaled/{n}"], **case["tolerance"])
        torch.testing.assert_close(merged[n], stored[f"merged/{n}"], **case["tolerance"])
    loss = sum(
        entropy(functional_call(Encoder(), merged, given[f"batches_{t}"][0]) @ given[f"head_{t}"].T) for t in (1, 2, 3)
    )
    torch.testing.assert_close(loss.detach().reshape(1).double(), stored["loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    for n, x in logits.items():
        torch.testing.assert_close(x.grad, stored[f"logit_gradient/{n}"], rtol=1e-3, atol=1e-5)
