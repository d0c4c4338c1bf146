"""The joint CALM: what it keeps of CALM, and what it does better, on the toy problem."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calmerge import Run, UsageError, calm_joint, task_arithmetic, tsv_m
from calmerge.fitting import expert_kl
from calmerge.fitting.targets import expert_pools
from calmerge.tasks.base import Batch


def distance(toy: Any, delta: Any) -> dict[str, float]:
    """How far the merged predictions are from every expert's, on the whole pool."""
    theta = {n: toy.base[n] + delta[n] for n in toy.tvs}
    return toy.tasks.loss(
        expert_kl, theta, [Batch(t, p.indices, p.targets) for t, p in expert_pools(toy.tvs, toy.tasks).items()]
    )


def test_no_update_is_its_start(toy: Any) -> None:
    for inner in (None, task_arithmetic):
        ours, start = calm_joint(toy.tvs, tasks=toy.tasks, inner=inner, steps=0), (inner or tsv_m)(toy.tvs)
        assert all(torch.equal(ours[n], start[n]) for n in ours)


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "lr": 0.05}])
def test_every_task_comes_nearer_to_its_expert(toy: Any, options: Any) -> None:
    delta = calm_joint(toy.tvs, tasks=toy.tasks, steps=60, **options)
    before, after = distance(toy, tsv_m(toy.tvs)), distance(toy, delta)
    assert sum(after.values()) < 0.7 * sum(before.values())
    assert all(after[t] < before[t] for t in after)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_an_entry_that_no_expert_moved_stays_the_base_s(toy: Any, optimizer: Any) -> None:
    for expert in toy.experts.values():
        expert["fc1.weight"][2] = toy.base["fc1.weight"][2]
    ours = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20, optimizer=optimizer)
    assert not ours["fc1.weight"][2].any()
    assert ours["fc1.weight"].any()


def test_the_order_of_tasks_decides_nothing(toy: Any) -> None:
    first = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20)
    toy.experts = {t: toy.experts[t] for t in ("d", "b", "a", "c")}
    again = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20)
    for n in first:
        torch.testing.assert_close(first[n], again[n], rtol=0, atol=1e-3)


def test_experts_are_asked_of_mixtures_where_inputs_are_few(toy: Any, tmp_path: Path) -> None:
    for fill, times in ((0, 1), (120, 1), (121, 5)):
        calm_joint(toy.tvs, tasks=toy.tasks, steps=1, fill=fill, run=Run(folder=tmp_path / f"{fill}"))
        asked = load_file(tmp_path / f"{fill}" / "logits-d.safetensors")["logits"]
        assert asked.shape == (times * 30, 4)
        torch.testing.assert_close(asked[:30], toy.tasks.logits(toy.tvs.expert("d"), "d"))


def test_targets_of_another_draw_are_refused(toy: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        with nullcontext() if seed == 0 else pytest.raises(UsageError, match="state of another run"):
            calm_joint(toy.tvs, tasks=toy.tasks, steps=0, seed=seed, run=Run(folder=tmp_path))


def test_it_composes_with_any_start(toy: Any) -> None:
    start = partial(task_arithmetic, scale=0.5)
    ours = calm_joint(toy.tvs, tasks=toy.tasks, inner=start, steps=40)
    assert sum(distance(toy, ours).values()) < sum(distance(toy, start(toy.tvs)).values())
