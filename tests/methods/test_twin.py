"""Twin-Merging: what is shared, what is exclusive, and who gets how much of it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calmerge import (
    CheckpointError,
    DataError,
    Merged,
    Run,
    StateDict,
    UsageError,
    add,
    open_merged,
    save,
    task_vectors,
    twin_merging,
    twin_merging_routed,
)
from calmerge._merged import storage
from calmerge.pieces.factor_patch import FactorPatch
from calmerge.pieces.router import Mixture, NeuralRouter, router_logits, router_start
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.module import ModuleModel
from calmerge.tasks.serving import serving

LOGITS = {"a": (2.0, 0.0, 0.0), "b": (0.0, 2.0, 0.0), "c": (0.0, 0.0, 2.0)}


def nothing(tvs: Any) -> StateDict:
    return StateDict({n: torch.zeros(s.shape) for n, s in tvs.specs.items()})


def test_full_rank_gives_the_experts_and_nothing_kept_gives_the_shared_one(toy: Any) -> None:
    tvs = toy.tvs
    whole, none = twin_merging(tvs, keep=1.0), twin_merging(tvs, keep=0)
    for task in tvs.tasks:
        for name, tau in tvs.of(task).items():
            torch.testing.assert_close(whole.for_task(task)[name], tau, rtol=1e-5, atol=1e-6)
            assert torch.equal(none.for_task(task)[name], whole.shared[name])
    assert none.nbytes == none.shared.nbytes


def test_exclusive_is_cut_by_singular_values_and_not_by_entries() -> None:
    """diag(3, 2, 1, 0.5) at rank 2 is diag(3, 2, 0, 0), also after a rotation, where no entry is zero."""
    eye = torch.eye(64)
    values = torch.zeros(64)
    values[:4] = torch.tensor([3.0, 2.0, 1.0, 0.5])
    q = torch.linalg.qr(torch.arange(64.0 * 64).reshape(64, 64).sin() + eye)[0]
    for turn in (eye, q):
        tvs = task_vectors({"w": torch.zeros(64, 64)}, {"a": {"w": turn @ values.diag() @ turn.T}})
        merged = twin_merging(tvs, inner=nothing, keep=2 / 64)
        cut = values.clone()
        cut[2:] = 0
        torch.testing.assert_close(merged.for_task("a")["w"], turn @ cut.diag() @ turn.T, rtol=0, atol=1e-5)


def test_exclusive_is_what_an_expert_has_beyond_the_shared_one_not_the_base() -> None:
    experts = {t: {"w": torch.full((9, 9), c)} for t, c in {"a": 1.0, "b": 3.0}.items()}
    merged = twin_merging(task_vectors({"w": torch.zeros(9, 9)}, experts), keep=0.2)
    patch = merged.patches["b"]
    assert isinstance(patch, FactorPatch)
    torch.testing.assert_close(patch.own()["w"], torch.full((9, 9), 3 - 0.29 * 4), rtol=1e-5, atol=1e-5)


def test_a_density_of_a_tenth_is_not_a_tenth_of_the_storage() -> None:
    """76 of 768 directions of a square matrix are 19.8 % of it, and 12.4 % of one four times as high."""
    for m, share in ((768, 0.198), (3072, 0.124)):
        tvs = task_vectors({"w": torch.zeros(m, 768)}, {"a": {"w": torch.zeros(m, 768)}})
        found = storage(twin_merging(tvs), tvs.base, tvs.experts)
        assert round(found["patches"]["a"] / found["model"], 3) == share


def fixed(w: Tensor, tasks: tuple[str, ...]) -> Any:
    """A router that gives rows of w, by the first features' order."""

    class Fixed:
        def __init__(self) -> None:
            self.tasks = tasks

        def __call__(self, features: Tensor) -> Tensor:
            return w[: len(features)]

    return Fixed()


def test_the_softmax_of_the_logits_mixes() -> None:
    p = router_start(2, 3, 0)
    p |= {f"norm{i}.{n}": t for i in range(2) for n, t in (("mean", torch.zeros(4)), ("variance", torch.ones(4)))}
    p["2.weight"], p["2.bias"] = torch.zeros(3, 4), torch.tensor(LOGITS["a"])
    w = NeuralRouter(("a", "b", "c"), StateDict(p))(torch.ones(1, 2))
    torch.testing.assert_close(w, torch.tensor([[0.7870, 0.1065, 0.1065]]), rtol=0, atol=1e-4)


def test_one_hot_weights_give_the_expert_s_outputs_and_equal_ones_the_mean(toy: Any) -> None:
    tvs = toy.tvs
    merged, x = twin_merging(tvs, keep=1.0), toy.tasks.split("b", "test").batch(torch.arange(12))[0]
    eye = torch.eye(4)[[1] * 12]
    mixed = Mixture(toy.tasks.model, tvs.base, merged, fixed(eye, tvs.tasks)).logits({}, x, "b")
    torch.testing.assert_close(mixed, toy.tasks.model.logits(tvs.expert("b"), x, "b"), rtol=1e-4, atol=1e-4)
    even = Mixture(toy.tasks.model, tvs.base, merged, fixed(torch.full((12, 4), 0.25), tvs.tasks)).logits({}, x, "b")
    average = dict(add(tvs.base, tvs.reduce(lambda tau, site: tau.mean(0))))
    torch.testing.assert_close(even, toy.tasks.model.logits(average, x, "b"), rtol=1e-4, atol=1e-4)


def test_a_batch_gives_what_its_inputs_give_alone(toy: Any) -> None:
    tvs, model = toy.tvs, toy.tasks.model
    merged = twin_merging_routed(tvs, tasks=toy.tasks, steps=30, batch=32, lr=0.01)
    assert merged.router is not None
    routed = merged.router.over(model, tvs.base, merged)
    x = torch.cat([toy.tasks.split(t, "test").batch(torch.arange(3))[0] for t in tvs.tasks])
    alone = torch.cat([routed.logits({}, x[i : i + 1], "c") for i in range(len(x))])
    torch.testing.assert_close(routed.logits({}, x, "c"), alone, rtol=1e-5, atol=1e-5)
    assert len(merged.router(model.outputs({}, x, "c").features).unique(dim=0)) > 1  # type: ignore[operator]


def test_experts_and_router_outputs_are_matched_by_name(toy: Any) -> None:
    tvs, model = toy.tvs, toy.tasks.model
    merged = twin_merging_routed(tvs, tasks=toy.tasks, steps=10, batch=32)
    assert isinstance(merged.router, NeuralRouter)
    x = toy.tasks.split("a", "test").batch(torch.arange(5))[0]
    expected = merged.router.over(model, tvs.base, merged).logits({}, x, "a")
    turned = Merged(merged.shared, dict(reversed(merged.patches.items())), merged.router)
    assert torch.equal(merged.router.over(model, tvs.base, turned).logits({}, x, "a"), expected)
    p, order = dict(merged.router.stored), torch.tensor([2, 0, 3, 1])
    p |= {"2.weight": p["2.weight"][order], "2.bias": p["2.bias"][order]}
    both = NeuralRouter(tuple(tvs.tasks[i] for i in order), StateDict(p))
    found = both.over(model, tvs.base, Merged(merged.shared, merged.patches, both)).logits({}, x, "a")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="the router knows the tasks a, b; there are patches of a, b, c, d"):
        Merged(merged.shared, merged.patches, NeuralRouter(("a", "b"), StateDict({})))


def test_the_router_is_saved_with_the_folder_and_counted(toy: Any, tmp_path: Path) -> None:
    tvs = toy.tvs
    merged = twin_merging_routed(tvs, tasks=toy.tasks, steps=10, batch=32)
    manifest = save(tmp_path / "out", tvs, merged, chunk=8)
    again = open_merged(tmp_path / "out")
    assert again.router is not None
    assert merged.router is not None
    assert again.router.tasks == tvs.tasks
    cost = manifest["storage"]
    assert cost["router"] == merged.router.stored.nbytes > 0
    assert cost["all"] == cost["model"] + cost["shared"] + sum(cost["patches"].values()) + cost["router"]
    assert {f for f in manifest["files"] if f.startswith("router/")} == {"router/model.safetensors"}
    for routed in (True, False):
        found = serving(merged, tvs.base, toy.tasks, routed=routed)("c", "test")
        assert torch.equal(found, serving(again, tvs.base, toy.tasks, routed=routed)("c", "test"))


def test_a_router_of_an_unknown_kind_is_refused(toy: Any, tmp_path: Path) -> None:
    save(tmp_path / "out", toy.tvs, twin_merging_routed(toy.tvs, tasks=toy.tasks, steps=0))
    (tmp_path / "out" / "router" / "router.json").write_text('{"kind": "neurla", "tasks": ["a"]}')
    with pytest.raises(CheckpointError, match=r"unknown kind of router 'neurla'\. Did you mean 'neural'\?"):
        open_merged(tmp_path / "out")


def separable(toy: Any) -> Tasks:
    """Pools and tests of every task around a point of its own."""
    x = {t: torch.eye(5)[i] * 3 + 0.1 * torch.arange(40 * 5.0).reshape(40, 5).sin() for i, t in enumerate("abcd")}
    data = {}
    for t in "abcd":
        pool = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[t][:30]))
        labels = torch.zeros(10, dtype=torch.long)
        test = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[t][30:], labels))
        data[t] = Task(pool, test)
    return Tasks(toy.tasks.model, data)


def test_the_router_learns_the_tasks_and_is_judged_on_inputs_it_has_not_seen(toy: Any) -> None:
    tasks, run = separable(toy), Run()
    merged = twin_merging_routed(toy.tvs, tasks=tasks, steps=200, lr=0.005, batch=64, run=run, keep=1.0)
    trace = run.trace["router"]
    assert trace.numbers["share of held-out inputs routed to their task"] > 0.9
    assert min(trace.held_out) < trace.held_out[0]
    assert isinstance(merged.router, NeuralRouter)
    theta = dict(add(toy.tvs.base, merged.shared))
    assert all(merged.router(tasks.features(theta, t, "test"))[:, i].mean() > 0.5 for i, t in enumerate("abcd"))


def test_a_seed_decides_the_router(toy: Any) -> None:
    made = [twin_merging_routed(toy.tvs, tasks=toy.tasks, steps=3, seed=s).router for s in (0, 0, 1)]
    one, two, three = (dict(router.stored) for router in made if router)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["0.weight"], three["0.weight"])


def test_means_and_variances_are_those_of_all_inputs_once_trained(toy: Any) -> None:
    merged = twin_merging_routed(toy.tvs, tasks=toy.tasks, steps=3, hold_out=0)
    assert isinstance(merged.router, NeuralRouter)
    theta = dict(add(toy.tvs.base, merged.shared))
    x = torch.cat([toy.tasks.features(theta, t) for t in toy.tvs.tasks])
    found: dict[str, Tensor] = {}
    router_logits(merged.router.stored, x, found=found)
    assert all(torch.equal(found[n], merged.router.stored[n]) for n in found)


def test_an_interrupted_router_goes_on_to_the_same_end(toy: Any, tmp_path: Path, save_always: None) -> None:
    fit = partial(twin_merging_routed, toy.tvs, tasks=toy.tasks, batch=16)
    whole = fit(steps=6)

    class Stop(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    from calmerge.fitting import routing

    original = routing.router_logits
    calls = 0

    def failing(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += "drop" in options
        if calls == 4:
            raise Stop
        return original(*args, **options)

    routing.router_logits = failing
    try:
        with pytest.raises(Stop):
            fit(steps=6, run=Run(tmp_path))
    finally:
        routing.router_logits = original
    again = fit(steps=6, run=Run(tmp_path))
    assert whole.router is not None
    assert again.router is not None
    assert all(torch.equal(whole.router.stored[n], again.router.stored[n]) for n in whole.router.stored)


def test_a_model_that_hides_its_features_is_named(toy: Any) -> None:
    class Closed:
        def logits(self, weights: Any, inputs: Any, task: str) -> Tensor:
            return torch.zeros(1, 2)

    with pytest.raises(DataError, match="Closed does not tell the features"):
        twin_merging_routed(toy.tvs, tasks=toy.tasks.with_model(Closed()), steps=1)


def test_inputs_of_several_parts_are_split_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.stack([left, right], 1) * self.weight

    experts = {"a": {"weight": torch.full((2,), 2.0)}, "b": {"weight": torch.full((2,), 5.0)}}
    tvs = task_vectors({"weight": torch.ones(2)}, experts)
    model, merged = ModuleModel(Two()), twin_merging(tvs, keep=1.0)
    mixed = Mixture(model, tvs.base, merged, fixed(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), ("a", "b")))
    x = {"left": torch.tensor([1.0, 2.0, 3.0]), "right": torch.tensor([4.0, 5.0, 6.0])}
    expected = torch.tensor([[2.0, 8.0], [10.0, 25.0], [6.0, 12.0]])
    torch.testing.assert_close(mixed.logits({}, x, "a"), expected)
    torch.testing.assert_close(mixed.logits({}, (x["left"], x["right"]), "a"), expected)
