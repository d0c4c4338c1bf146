"""One fit to all tasks at once, with label-free stopping."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import DataError, Run, StateDict, average
from calmerge._task_vectors import materialise
from calmerge.fitting import Pool, expert_kl
from calmerge.fitting.joint import Schedule, fit_jointly
from calmerge.fitting.parametrise import moved, span
from calmerge.fitting.targets import expert_pools
from calmerge.tasks.base import Batch

QUICK = Schedule(steps=20, lr=0.02, batch=8, hold_out=0.0, seed=0)


def joint(toy: Any, schedule: Schedule, **options: Any) -> StateDict:
    tvs = toy.tvs
    pools = options.pop("pools", None) or expert_pools(tvs, toy.tasks)
    start = materialise(average(tvs))
    return fit_jointly(
        span(start, moved(tvs)), expert_kl, pools, schedule, tvs=tvs, tasks=toy.tasks, label="joint", key="", **options
    )


def held_out_loss(toy: Any, delta: StateDict) -> float:
    theta = {n: toy.base[n] + delta[n] for n in toy.tvs}
    batches = [Batch(t, p.indices, p.targets) for t, p in expert_pools(toy.tvs, toy.tasks).items()]
    return sum(toy.tasks.loss(expert_kl, theta, batches).values())


def test_the_fit_comes_nearer_to_the_experts(toy: Any) -> None:
    before = held_out_loss(toy, materialise(average(toy.tvs)))
    assert held_out_loss(toy, joint(toy, QUICK)) < 0.7 * before


def test_the_best_held_out_update_is_kept_and_not_the_last(toy: Any) -> None:
    """A step size that throws the model away leaves the start, which had the least held-out loss."""
    run = Run()
    found = joint(toy, QUICK._replace(lr=50.0, hold_out=0.3), run=run)
    start = materialise(average(toy.tvs))
    assert all(torch.equal(found[n], start[n]) for n in start)
    seen = run.trace["joint"].held_out
    assert min(seen) == seen[0]


def test_the_fit_ends_when_waiting_does_not_help(toy: Any) -> None:
    run = Run()
    joint(toy, QUICK._replace(lr=50.0, hold_out=0.3, steps=100), run=run)
    assert len(run.trace["joint"].loss) == 30  # looked at 0, 10, 20 and 30; three looks without gain


def test_balanced_losses_weigh_tasks_alike(toy: Any) -> None:
    """Ten times the logits of one task, and so about a hundred times its loss, do not decide."""
    pools = expert_pools(toy.tvs, toy.tasks)
    loud = pools | {"a": Pool(pools["a"].indices, 30 * pools["a"].targets)}

    def loss(delta: StateDict) -> Tensor:
        theta = {n: toy.base[n] + delta[n] for n in toy.tvs}
        quiet = [Batch(t, p.indices, p.targets) for t, p in loud.items() if t != "a"]
        return sum(toy.tasks.loss(expert_kl, theta, quiet).values())

    plain = loss(joint(toy, QUICK, pools=loud))
    assert loss(joint(toy, QUICK._replace(balance=True), pools=loud)) < plain


def test_a_pool_that_leaves_nothing_to_learn_from_is_refused(toy: Any) -> None:
    pools = {t: Pool(torch.arange(1), torch.zeros(1, 4)) for t in toy.tvs.tasks}
    with pytest.raises(DataError, match=r"task 'a': its pool of 1 leaves nothing to learn from once 0.3 of it is held"):
        joint(toy, QUICK._replace(hold_out=0.3), pools=pools)


def test_held_out_and_learned_examples_are_apart() -> None:
    learn, held = Pool(torch.arange(20), torch.arange(20) * 10).split(0.25, 1, "a")
    assert sorted(learn.indices.tolist() + held.indices.tolist()) == list(range(20))
    assert len(held.indices) == 5
    assert (held.targets == 10 * held.indices).all()
