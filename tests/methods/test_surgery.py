"""Representation Surgery and heads re-aligned: nothing changes at first, experts are left alone, all is declared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import (
    DataError,
    Run,
    StateDict,
    UsageError,
    add,
    average,
    export,
    open_merged,
    realign_heads,
    save,
    smile,
    surgery,
    tall_masks,
    twin_merging_routed,
)
from calmerge.pieces.head_patch import SurgeryPatch
from calmerge.pieces.least_squares import affine_fit
from calmerge.tasks.base import Outputs, Task, Tasks
from calmerge.tasks.serving import Realigned, serving


def base_of(toy: Any) -> Any:
    return toy.tvs.base.only_names(toy.tvs.specs)


def expert_alone(toy: Any) -> Any:
    """One task, whose merge is its expert."""
    return toy.tvs.only(["b"])


def full(tvs: Any) -> Any:
    return tvs.of(tvs.tasks[0])


def distance(toy: Any, merged: Any, task: str) -> float:
    """Mean |z' - z_expert| of class scores over the pool."""
    own = toy.tasks.logits(toy.tvs.expert(task), task)
    return (serving(merged, base_of(toy), toy.tasks)(task, "pool") - own).abs().mean().item()


def test_at_the_start_the_output_is_the_merged_model_s_exactly(toy: Any) -> None:
    merged = surgery(toy.tvs, tasks=toy.tasks, steps=0)
    weights = dict(add(toy.tvs.base, merged.shared))
    for task in toy.tvs.tasks:
        expected = toy.tasks.logits(weights, task, "test")
        assert torch.equal(serving(merged, base_of(toy), toy.tasks)(task, "test"), expected)


def test_a_merge_that_is_the_expert_has_no_loss_and_does_not_move(toy: Any) -> None:
    run = Run()
    tvs = expert_alone(toy)
    tasks = Tasks(toy.tasks.model, {"b": toy.tasks["b"]})
    merged = surgery(tvs, tasks=tasks, inner=full, steps=5, run=run)
    assert run.trace["surgery"].loss == [0.0] * 5
    assert not dict(merged.patches["b"].stored)["up"].any()
    found = realign_heads(tvs, tasks=tasks, inner=full).patches["b"].stored
    assert not any(t.any() for t in found.values())


def test_the_bias_of_the_features_is_taken_out(toy: Any) -> None:
    run = Run()
    before, after = (surgery(toy.tvs, tasks=toy.tasks, steps=n, lr=0.01, run=run) for n in (0, 300))
    for task in toy.tvs.tasks:
        losses = run.trace["surgery"].per_task[task]
        assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
        assert distance(toy, after, task) < distance(toy, before, task)


def test_the_loss_is_the_mean_of_absolute_differences(toy: Any) -> None:
    run = Run()
    merged = surgery(toy.tvs, tasks=toy.tasks, steps=1, batch=30, run=run)
    theta = dict(add(toy.tvs.base, merged.shared))
    for task in toy.tvs.tasks:
        z, e = toy.tasks.features(theta, task), toy.tasks.features(toy.tvs.expert(task), task)
        assert run.trace["surgery"].per_task[task] == [pytest.approx((z - e).abs().mean().item(), rel=1e-5)]


def test_an_adapter_has_two_thin_matrices_without_bias_and_no_more(toy: Any) -> None:
    merged, run = surgery(toy.tvs, tasks=toy.tasks, steps=1, rank=3, run=(run := Run())), run
    assert {n: s.shape for n, s in merged.patches["a"].stored.specs.items()} == {"down": (3, 6), "up": (6, 3)}
    assert run.trained == [4 * 2 * 3 * 6]
    down = dict(surgery(toy.tvs, tasks=toy.tasks, steps=0).patches["a"].stored)["down"]
    assert 0.3 < down.abs().max() <= 6**-0.5


def test_the_patch_works_on_what_the_head_is_given_and_the_head_is_frozen() -> None:
    patch = SurgeryPatch(StateDict({"down": torch.eye(2), "up": torch.eye(2)}))
    head = torch.tensor([[1.0], [10.0]])
    scores = patch.scores(torch.tensor([[2.0, -3.0]]), lambda z: z @ head)
    assert scores.tolist() == [[-30.0]]  # z' = (2, -3) - (2, 0)


def test_a_seed_decides_start_and_batches(toy: Any) -> None:
    made = [dict(surgery(toy.tvs, tasks=toy.tasks, steps=2, seed=s).patches["c"].stored) for s in (0, 0, 1)]
    assert all(torch.equal(made[0][n], made[1][n]) for n in ("down", "up"))
    assert not torch.equal(made[0]["up"], made[2]["up"])


def shifted(toy: Any) -> Tasks:
    """A model whose features are A z + b in place of the expert's z, where the merge's weights are used."""

    class Shifted:
        def outputs(self, weights: Any, inputs: Tensor, task: str) -> Outputs:
            z = torch.cat([inputs, inputs.sin()[:, :1]], 1)
            if "expert" not in weights:
                z = z @ turn + 1.0
            return Outputs(self.head(z, task), z)

        def logits(self, weights: Any, inputs: Tensor, task: str) -> Tensor:
            return self.outputs(weights, inputs, task).logits

        def head(self, features: Tensor, task: str) -> Tensor:
            out: Tensor = toy.heads[task](features).detach()
            return out

    turn = torch.eye(6) + 0.3 * torch.arange(36.0).reshape(6, 6).cos()
    return toy.tasks.with_model(Shifted())


@pytest.mark.parametrize("target", ["features", "logits"])
def test_what_an_affine_map_can_bring_back_comes_back(toy: Any, target: Any, monkeypatch: Any) -> None:
    tasks, tvs = shifted(toy), toy.tvs
    monkeypatch.setattr(type(tvs), "expert", lambda self, task: {"expert": torch.zeros(1)})
    run = Run()
    merged = realign_heads(tvs, tasks=tasks, target=target, run=run)
    found = serving(merged, base_of(toy), tasks)
    for task in tvs.tasks:
        expected = tasks.logits({"expert": torch.zeros(1)}, task, "test")
        torch.testing.assert_close(found(task, "test"), expected, rtol=0.02, atol=0.05)
        numbers = run.trace["realign_heads"].numbers
        assert numbers[f"error of {task} on an input left out"] < 0.01 * numbers[f"error of {task} before"]


@pytest.mark.parametrize("target", ["features", "logits"])
def test_a_large_ridge_leaves_the_head_but_for_its_mean(toy: Any, target: Any) -> None:
    patch = realign_heads(toy.tvs, tasks=toy.tasks, target=target, ridge=1e9).patches["d"].stored
    assert patch[f"{target}/weight"].abs().max() < 1e-6
    assert patch[f"{target}/bias"].abs().max() > 1e-3


def test_heads_realigned_are_nearer_to_the_expert_s(toy: Any) -> None:
    plain = surgery(toy.tvs, tasks=toy.tasks, inner=average, steps=0)
    merged = realign_heads(toy.tvs, tasks=toy.tasks, inner=average)
    assert all(distance(toy, merged, t) < distance(toy, plain, t) for t in toy.tvs.tasks)


def test_the_error_left_out_is_that_of_fits_without_each_pair() -> None:
    x, y = torch.arange(24.0).reshape(8, 3).sin(), torch.arange(16.0).reshape(8, 2).cos()
    ridge = 0.3
    found = affine_fit(x, y, ridges=[ridge])
    centred = x.double() - x.double().mean(0)
    absolute = ridge * (centred.T @ centred).diagonal().mean()
    errors = []
    for i in range(8):
        rest = torch.arange(8) != i
        a, b = x[rest].double(), y[rest].double()
        ma, mb = a.mean(0), b.mean(0)
        w = torch.linalg.solve((a - ma).T @ (a - ma) + absolute * torch.eye(3).double(), (a - ma).T @ (b - mb)).T
        errors.append((w @ (x[i].double() - ma) + mb - y[i].double()).square().sum())
    assert found.error == pytest.approx(torch.stack(errors).mean().item(), rel=1e-9)


def test_the_ridge_is_chosen_by_the_error_left_out() -> None:
    x = torch.arange(60.0).reshape(20, 3).sin()
    assert affine_fit(x, 5 * x).ridge == 1e-4
    noise = (torch.arange(20.0) * 37).sin().round()[:, None] * torch.tensor([[1.0]])
    best = affine_fit(x, noise)
    assert best.error == min(affine_fit(x, noise, ridges=[r]).error for r in (1e-4, 1e-2, 1.0, 10.0, best.ridge))


@pytest.mark.parametrize("method", [surgery, realign_heads])
def test_results_are_declared_and_never_among_frozen_heads(method: Any, toy: Any, tmp_path: Path) -> None:
    options = {"steps": 2} if method is surgery else {}
    merged = method(toy.tvs, tasks=toy.tasks, **options)
    assert merged.heads == "realigned"
    assert tall_masks(toy.tvs).heads == "frozen"
    save(tmp_path / "out", toy.tvs, merged)
    manifest = json.loads((tmp_path / "out" / "calmerge.json").read_text())
    assert manifest["heads"] == "realigned"
    again = open_merged(tmp_path / "out")
    assert again.heads == "realigned"
    for task in toy.tvs.tasks:
        assert manifest["storage"]["patches"][task] == merged.patches[task].stored.nbytes
        one, two = (serving(m, base_of(toy), toy.tasks)(task, "test") for m in (merged, again))
        assert torch.equal(one, two)
    with pytest.raises(UsageError, match="changes what the heads are given, which the architecture of 'a' has no"):
        export(tmp_path / "out", "a", tmp_path / "a")


@pytest.mark.parametrize("method", [surgery, realign_heads, smile, twin_merging_routed])
def test_a_lower_precision_of_the_model_is_its_own_affair(method: Any, toy: Any) -> None:
    """Routers, mixtures and patches compute in float32 beside a model in bfloat16."""
    data = {t: toy.tasks[t] for t in toy.tvs.tasks}
    options = {} if method is smile else {"tasks": toy.tasks}
    merged = method(toy.tvs, **options)
    half = Tasks(toy.tasks.model, data, autocast=torch.bfloat16)
    for task in toy.tvs.tasks:
        one, two = (serving(merged, base_of(toy), tasks)(task, "test") for tasks in (toy.tasks, half))
        assert (one - two).abs().median() < 0.05 * one.abs().max()


def test_a_model_that_does_not_run_its_heads_alone_is_named(toy: Any) -> None:
    class NoHead:
        def outputs(self, weights: Any, inputs: Tensor, task: str) -> Outputs:
            return Outputs(inputs, inputs)

        def logits(self, weights: Any, inputs: Tensor, task: str) -> Tensor:
            return inputs

    with pytest.raises(DataError, match="NoHead does not run its heads alone"):
        Realigned(NoHead(), {})  # type: ignore[arg-type]


def test_token_features_are_corrected_token_by_token_but_have_no_affine_logits(toy: Any) -> None:
    class Tokens:
        def outputs(self, weights: Any, inputs: Tensor, task: str) -> Outputs:
            z = torch.stack([inputs, 2 * inputs], 1) + ("gain" in weights) * weights.get("gain", 0)
            return Outputs(self.head(z, task), z)

        def logits(self, weights: Any, inputs: Tensor, task: str) -> Tensor:
            return self.outputs(weights, inputs, task).logits

        def head(self, features: Tensor, task: str) -> Tensor:
            return features.sum(1)

    tasks = toy.tasks.with_model(Tokens())
    for merged in (surgery(toy.tvs, tasks=tasks, steps=2), realign_heads(toy.tvs, tasks=tasks)):
        assert serving(merged, base_of(toy), tasks)("a", "test").shape == (12, 5)
    with pytest.raises(DataError, match="one vector a token; use target: features"):
        realign_heads(toy.tvs, tasks=tasks, target="logits")


def test_a_task_without_a_pool_is_named(toy: Any) -> None:
    with pytest.raises(UsageError, match="no task 'd'"):
        surgery(toy.tvs, tasks=Tasks(toy.tasks.model, {t: Task(toy.tasks[t].pool) for t in "abc"}), steps=1)
