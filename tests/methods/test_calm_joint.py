"""The joint CALM: what it keeps of CALM, and what it does better, on the toy problem."""

from functools import partial
from typing import Any

import torch

from calmerge import Run, calm_joint, task_arithmetic, tsv_m
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


def test_every_task_comes_nearer_to_its_expert(toy: Any) -> None:
    before, after = distance(toy, tsv_m(toy.tvs)), distance(toy, calm_joint(toy.tvs, tasks=toy.tasks, steps=60))
    assert sum(after.values()) < 0.7 * sum(before.values())
    assert all(after[t] < before[t] for t in after)


def test_an_entry_that_no_expert_moved_stays_the_base_s(toy: Any) -> None:
    for expert in toy.experts.values():
        expert["fc1.weight"][2] = toy.base["fc1.weight"][2]
    ours = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20)
    assert not ours["fc1.weight"][2].any()
    assert ours["fc1.weight"].any()


def test_the_order_of_tasks_decides_nothing(toy: Any) -> None:
    first = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20)
    toy.experts = {t: toy.experts[t] for t in ("d", "b", "a", "c")}
    again = calm_joint(toy.tvs, tasks=toy.tasks, inner=task_arithmetic, steps=20)
    for n in first:
        torch.testing.assert_close(first[n], again[n], rtol=0, atol=1e-3)


def test_an_update_that_does_not_generalise_is_not_kept(toy: Any) -> None:
    run = Run()
    ours = calm_joint(toy.tvs, tasks=toy.tasks, steps=30, lr=30.0, hold_out=0.3, run=run)
    start = tsv_m(toy.tvs)
    assert all(torch.equal(ours[n], start[n]) for n in ours)
    assert run.trace["calm_joint"].held_out[0] == min(run.trace["calm_joint"].held_out)


def test_it_composes_with_any_start(toy: Any) -> None:
    start = partial(task_arithmetic, scale=0.5)
    ours = calm_joint(toy.tvs, tasks=toy.tasks, inner=start, steps=40)
    assert sum(distance(toy, ours).values()) < sum(distance(toy, start(toy.tvs)).values())
