"""CALM: sampling, order, groups, resume and trace (masks by given forces: tests/fitting/test_masks.py)."""

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from calmerge import (
    DataError,
    FitError,
    Run,
    TaskVectors,
    UsageError,
    Weights,
    average,
    calm,
    task_arithmetic,
    task_vectors,
    ties,
)
from calmerge._random import uniform
from calmerge.methods.calm import automatic_groups, credible_pools
from calmerge.pieces.mask import load_masks
from calmerge.report.traces import CalmTrace
from calmerge.tasks.base import Batch, Task, Tasks

QUICK = {"steps": 8, "batch": 10, "share": 0.2}


class Changed(Tasks):
    """Tasks whose gradients are watched, scaled, stilled, or broken down at one update."""

    def __init__(
        self, tasks: Tasks, *, scale: float = 1.0, broken: tuple[int, int] | None = None, bad: bool = False
    ) -> None:
        super().__init__(tasks.model, dict(tasks))
        self.scale, self.broken, self.bad = scale, broken, bad
        self.batches: list[tuple[int, Batch]] = []

    def gradient(self, objective: Any, batches: Any) -> Any:
        def scaled(logits: Tensor, targets: Tensor | None) -> Tensor:
            return self.scale * objective(logits, targets)

        def watched(step: int) -> Iterator[Batch]:
            chosen = list(batches(step))
            if self.broken == (len({b.task for b in chosen}), step):
                if self.bad:
                    self.scale = float("nan")
                else:
                    raise KeyboardInterrupt
            self.batches += [(step, b) for b in chosen]
            yield from chosen

        return super().gradient(scaled, watched)


def still(toy: Any) -> Tasks:
    """No gradient pulls at any entry, so that no mask takes one (a tiny model starts with none)."""
    return Changed(toy.tasks, scale=0.0)


def same(a: Weights, b: Weights) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# Start and order


def test_a_start_of_three_is_their_sum_at_0_3(toy: Any) -> None:
    delta = calm(toy.tvs, tasks=still(toy), groups=[["a", "b", "c"], ["d"]], lr=1.0)
    expected = task_arithmetic(toy.tvs.only("abc"), scale=0.3)
    assert all(torch.equal(delta[n], expected[n]) for n in delta if n != "unused")


def test_a_start_of_two_is_a_mask_between_them_without_the_0_3(toy: Any) -> None:
    run = Run()
    delta = calm(toy.tvs, tasks=still(toy), groups=[["b", "a"], ["c"], ["d"]], lr=1.0, run=run)
    assert all(torch.equal(delta[n], toy.tvs.of("b")[n]) for n in delta if n != "unused")
    trace = run.trace["calm"]
    assert trace.start == ["b"]
    assert [stage.task for stage in trace.stages] == ["a", "c", "d"]
    assert [stage.seen for stage in trace.stages] == [["b", "a"], ["b", "a", "c"], ["b", "a", "c", "d"]]


def test_a_start_of_two_that_was_chosen_automatically_is_their_sum_at_0_3() -> None:
    """Only a pair that someone names is merged by a mask: `sequential=2` is two stages for any number of experts."""
    tvs, tasks = thresholds(**FOUR)
    run = Run()
    delta = calm(tvs, tasks=Changed(tasks, scale=0.0), sequential=2, ratio=1.0, steps=2, rest="copy", run=run)
    assert (run.trace["calm"].start, len(run.trace["calm"].stages)) == (["a", "b"], 2)
    assert [delta[t].item() for t in "ab"] == pytest.approx([0.3, 0.3])


def test_a_start_of_one_is_that_expert(toy: Any) -> None:
    run = Run()
    tvs = toy.tvs.only("ab")
    assert same(calm(tvs, tasks=still(toy), groups=[["a"], ["b"]], run=run),
                calm(tvs, tasks=still(toy), groups=[["a", "b"]]))  # fmt: skip
    assert [stage.task for stage in run.trace["calm"].stages] == ["b"]
    assert same(calm(toy.tvs.only("a"), tasks=toy.tasks, groups=[["a"]]), toy.tvs.of("a"))


def test_any_merge_may_be_the_start(toy: Any) -> None:
    for inner in (average, partial(ties, keep=0.5)):
        delta = calm(toy.tvs, tasks=toy.tasks, groups=[list("abcd")], inner=inner)
        assert same(delta, inner(toy.tvs))
    run = Run()
    delta = calm(toy.tvs.only("ab"), tasks=still(toy), groups=[["a", "b"]], inner=average, run=run)
    assert same(delta, average(toy.tvs.only("ab")))  # with an inner merge of its own, two are no pair for a mask
    assert run.trace["calm"].stages == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"], ["c", "d"]], r"the first holds the start's tasks, every later one exactly one task; got \[\['a'"),
        ([["a", "b"], [], ["c"], ["d"]], "every later one exactly one task"),
        ([[], ["a"], ["b"], ["c"], ["d"]], "the first holds the start's tasks"),
        ([["a", "b", "c"], ["dd"]], r"groups: no expert 'dd'. Did you mean 'd'\?"),
        ([["a", "b", "c"], ["a"]], "groups: 'a' is named twice"),
        ([["a", "b"], ["c"]], "groups: d stand in no group; leave the expert out, or add it"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: list[list[str]], message: str, toy: Any) -> None:
    with pytest.raises(UsageError, match=message):
        calm(toy.tvs, tasks=toy.tasks, groups=groups)


@pytest.mark.parametrize("sequential", [4, 5])
def test_the_start_needs_a_task(sequential: int, toy: Any) -> None:
    with pytest.raises(UsageError, match=rf"less than the number of experts \(4\), got {sequential}"):
        calm(toy.tvs, tasks=toy.tasks, sequential=sequential)


class Threshold:
    """Class 0 where x < w of the task, else class 1."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        x = inputs[0] if isinstance(inputs, tuple | list) else inputs
        margin = weights[task] - x[:, 0]
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def thresholds(**pools: list[float]) -> tuple[TaskVectors, Tasks]:
    """Expert t has w_t = 1, the base 0; Task Arithmetic of all gives 0.3 and misses inputs above it."""
    base = {t: torch.zeros(1) for t in pools}
    tvs = task_vectors(base, {t: base | {t: torch.ones(1)} for t in pools})
    loaders = {t: DataLoader(TensorDataset(torch.tensor(x)[:, None])) for t, x in pools.items()}
    return tvs, Tasks(Threshold(), {t: Task(pool) for t, pool in loaders.items()})


FOUR = {"a": [0.5, 0.6, 0.1, 0.2], "b": [0.1, 0.2, 0.25, 0.28], "c": [0.5, 0.6, 0.7, 0.8], "d": [0.1, 0.5, 0.6, 0.7]}


@pytest.mark.parametrize(
    ("sequential", "groups"),
    [
        (0, [["a", "b", "c", "d"]]),
        (1, [["a", "b", "d"], ["c"]]),
        (2, [["a", "b"], ["d"], ["c"]]),
        (3, [["b"], ["a"], ["d"], ["c"]]),
    ],
)
def test_tasks_that_the_start_merge_misses_most_come_later_the_worst_last(
    sequential: int, groups: list[list[str]]
) -> None:
    """Agreement with the pseudo-labels: a 1/2, b 1, c 0, d 1/4."""
    tvs, tasks = thresholds(**FOUR)
    assert automatic_groups(tvs, tasks, credible_pools(tvs, tasks, ratio=1.0), sequential) == groups


def test_equal_agreement_keeps_the_order_of_the_experts() -> None:
    tvs, tasks = thresholds(x=[0.1, 0.2], y=[0.1, 0.2], z=[0.1, 0.2])
    assert automatic_groups(tvs, tasks, credible_pools(tvs, tasks, ratio=1.0), 1) == [["x", "y"], ["z"]]


def test_the_order_of_stages_matters(toy: Any) -> None:
    one, other = (
        calm(toy.tvs, tasks=toy.tasks, groups=[["a", "b", "c"][:2], [x], [y]], inner=average, **QUICK)
        for x, y in ("cd", "dc")
    )
    assert not same(one, other)


# Masks


def test_every_entry_is_the_running_merge_s_or_the_new_expert_s(toy: Any, tmp_path: Path) -> None:
    """No blend, no rescaling: taken entries have coefficient 1, the rest that of the start."""
    start = task_arithmetic(toy.tvs.only("abc"), scale=0.3)
    delta = calm(toy.tvs, tasks=toy.tasks, groups=[["a", "b", "c"], ["d"]], masks=tmp_path, **QUICK)
    masks = load_masks(tmp_path / "1-d.safetensors")
    assert set(masks) == set(toy.tvs) - {"unused"}  # which no loss reaches
    for name, mask in masks.items():
        assert torch.equal(delta[name], torch.where(mask, toy.tvs.of("d")[name], start[name]))
    assert torch.equal(delta["unused"], 0.5 * (start["unused"] + toy.tvs.of("d")["unused"]))
    assert 0 < sum(int(m.sum()) for m in masks.values()) < sum(m.numel() for m in masks.values())


def test_frozen_patterns_and_copying(toy: Any, tmp_path: Path) -> None:
    groups = [["a", "b", "c"], ["d"]]
    start = task_arithmetic(toy.tvs.only("abc"), scale=0.3)
    delta = calm(toy.tvs, tasks=toy.tasks, groups=groups, frozen=["norm.*"], rest="copy", masks=tmp_path, **QUICK)
    assert sorted(load_masks(tmp_path / "1-d.safetensors")) == ["fc1.bias", "fc1.weight", "fc2.weight", "gain"]
    for name in ("norm.weight", "norm.bias", "unused"):
        assert torch.equal(delta[name], start[name])


def test_masks_are_saved_for_every_stage_at_one_bit_an_entry(toy: Any, tmp_path: Path) -> None:
    run = Run()
    calm(toy.tvs, tasks=toy.tasks, groups=[["a"], ["b"], ["c"], ["d"]], masks=tmp_path / "deep" / "masks", run=run,
         **QUICK)  # fmt: skip
    files = sorted((tmp_path / "deep" / "masks").iterdir())
    assert [f.name for f in files] == ["1-b.safetensors", "2-c.safetensors", "3-d.safetensors"]
    for file, stage in zip(files, run.trace["calm"].stages, strict=True):
        masks = load_masks(file)
        assert {n: m.shape for n, m in masks.items()} == {n: toy.tvs.specs[n].shape for n in masks}
        assert sum(int(m.sum()) for m in masks.values()) == round(stage.taken * stage.entries)


def test_the_consensus_loss_falls(toy: Any) -> None:
    run = Run()
    calm(toy.tvs, tasks=toy.tasks, groups=[["a", "b", "c"], ["d"]], steps=30, batch=30, share=0.2, run=run)
    loss = [sum(at) for at in zip(*run.trace["calm"].stages[0].loss.values(), strict=True)]
    assert loss[-1] < 0.9 * loss[0]


def test_more_entries_are_taken_where_a_larger_share_is_asked_for(toy: Any) -> None:
    taken = []
    for share in (0.01, 0.1, 0.4):
        run = Run()
        calm(toy.tvs, tasks=toy.tasks, sequential=1, steps=20, batch=30, share=share, run=run)
        taken.append(run.trace["calm"].stages[0].taken)
    assert taken == sorted(set(taken))


@pytest.mark.parametrize("scale", [1000.0, 2.0**-20])
def test_the_automatic_step_size_is_free_of_the_scale_of_the_loss(scale: float, toy: Any) -> None:
    expected = calm(toy.tvs, tasks=toy.tasks, sequential=2, **QUICK)
    assert same(calm(toy.tvs, tasks=Changed(toy.tasks, scale=scale), sequential=2, **QUICK), expected)


def test_a_fixed_step_size_is_not(toy: Any) -> None:
    taken = []
    for lr in (1.0, 1e7):
        run = Run()
        calm(toy.tvs, tasks=toy.tasks, sequential=1, lr=lr, run=run, **QUICK)
        assert run.trace["calm"].stages[0].lr == lr
        taken.append(run.trace["calm"].stages[0].taken)
    assert taken[0] < 0.2 < taken[1]


# Data


def test_pseudo_labels_are_the_experts_and_fixed_before_all_stages(toy: Any) -> None:
    tasks = Changed(toy.tasks)
    calm(toy.tvs, tasks=tasks, groups=[["a", "b"], ["c"], ["d"]], **QUICK)
    for task in "abcd":
        expert = {n: t for n, t in toy.experts[task].items() if t.is_floating_point()}
        labels = toy.tasks.logits(expert, task).argmax(1)
        seen = [b for _, b in tasks.batches if b.task == task]
        assert seen
        assert all(torch.equal(b.targets, labels[b.indices]) for b in seen)


def test_only_credible_samples_take_part(toy: Any) -> None:
    tasks = Changed(toy.tasks)
    calm(toy.tvs, tasks=tasks, sequential=1, ratio=0.5, **QUICK)
    pools = credible_pools(toy.tvs, toy.tasks, ratio=0.5)
    for _, batch in tasks.batches:
        assert set(batch.indices.tolist()) <= set(pools[batch.task].indices.tolist())
    assert {t: len(p.indices) < 16 for t, p in pools.items()} == dict.fromkeys("abcd", True)


def test_each_update_sees_every_task_seen_so_far_in_two_batches(toy: Any) -> None:
    tasks = Changed(toy.tasks)
    calm(toy.tvs, tasks=tasks, groups=[["a", "b", "c"], ["d"]], steps=3, batch=10)
    last = [b for step, b in tasks.batches if step == 2]
    assert [b.task for b in last] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert not set(last[0].indices.tolist()) & set(last[1].indices.tolist())


def test_heads_are_frozen(toy: Any) -> None:
    before = {t: head.weight.clone() for t, head in toy.heads.items()}
    calm(toy.tvs, tasks=toy.tasks, sequential=1, **QUICK)
    assert all(torch.equal(head.weight, before[t]) and head.weight.grad is None for t, head in toy.heads.items())


def test_true_labels_are_never_used(toy: Any) -> None:
    expected = calm(toy.tvs, tasks=toy.tasks, sequential=1, **QUICK)
    labelled = {}
    for t in toy.tasks:
        (x,) = toy.tasks[t].pool.dataset.tensors
        labelled[t] = Task(DataLoader(TensorDataset(x, torch.full((len(x),), -7))))
    assert same(calm(toy.tvs, tasks=Tasks(toy.tasks.model, labelled), sequential=1, **QUICK), expected)


def test_plain_and_no_sampling(toy: Any) -> None:
    for sampling, kept in (("plain", 15), ("all", 30)):
        pools = credible_pools(toy.tvs, toy.tasks, ratio=0.5, sampling=sampling)  # type: ignore[arg-type]
        assert {len(p.indices) for p in pools.values()} == {kept}
        calm(toy.tvs, tasks=toy.tasks, sequential=1, sampling=sampling, ratio=0.5, **QUICK)  # type: ignore[arg-type]


def test_pools_smaller_than_a_batch_will_do(toy: Any) -> None:
    tasks = {t: Task(DataLoader(TensorDataset(toy.tasks[t].pool.dataset.tensors[0][:7]))) for t in toy.tasks}
    calm(toy.tvs, tasks=Tasks(toy.tasks.model, tasks), sequential=1, steps=2)


def test_a_class_that_is_never_predicted_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tvs, _ = thresholds(**FOUR)
    tasks = {
        t: Task(DataLoader(TensorDataset(torch.tensor(x)[:, None])), classes=("low", "high")) for t, x in FOUR.items()
    }
    run = Run()
    with caplog.at_level(logging.WARNING, logger="calmerge"):
        calm(tvs, tasks=Tasks(Threshold(), tasks), sequential=1, steps=2, ratio=0.5, run=run)
    assert "task 'c': its expert predicts class high for no example of the pool." in caplog.messages
    assert run.trace["calm"].samplers["c"]["high"].predicted == 0
    assert run.trace["calm"].samplers["c"]["low"].model_dump() == {"kept": 2, "predicted": 4}


def test_a_task_that_keeps_no_example_is_refused() -> None:
    tvs, tasks = thresholds(a=[0.5], b=[0.1, 0.2])
    with pytest.raises(DataError, match=r"task 'a': no class keeps an example at ratio 0.9, of a pool of 1"):
        calm(tvs, tasks=tasks, sequential=1)


def test_an_expert_without_a_task_is_named(toy: Any) -> None:
    tasks = Tasks(toy.tasks.model, {t: toy.tasks[t] for t in "abc"})
    with pytest.raises(UsageError, match="no task 'd'"):
        calm(toy.tvs, tasks=tasks, sequential=1)


def test_a_loss_that_is_not_finite_names_task_and_update(toy: Any) -> None:
    with pytest.raises(FitError, match="update 3: the loss of task 'a' is nan"):
        calm(toy.tvs, tasks=Changed(toy.tasks, broken=(4, 2), bad=True), groups=[["a", "b", "c"], ["d"]], **QUICK)


# Resume and trace

RESUMED = QUICK | {"groups": [["a", "b", "c"][:2], ["c"], ["d"]], "inner": average}


@pytest.mark.parametrize("broken", [(3, 0), (3, 5), (4, 0), (4, 1), (4, 7)])
def test_a_killed_run_goes_on_and_ends_the_same(
    broken: tuple[int, int], toy: Any, tmp_path: Path, save_always: None
) -> None:
    """Killed at an update of the first stage (three tasks seen) or of the second (four)."""
    whole, resumed = Run(), Run(tmp_path / "state")
    expected = calm(toy.tvs, tasks=toy.tasks, run=whole, masks=tmp_path / "whole", **RESUMED)
    with pytest.raises(KeyboardInterrupt):
        calm(toy.tvs, tasks=Changed(toy.tasks, broken=broken), run=resumed, **RESUMED)
    tasks = Changed(toy.tasks)
    found = calm(toy.tvs, tasks=tasks, run=resumed, masks=tmp_path / "resumed", **RESUMED)
    assert same(found, expected)
    assert resumed.trace["calm"] == whole.trace["calm"]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes()
    if broken[0] == 4:  # the finished stage is not done again
        assert all(len({b.task for s, b in tasks.batches if s == step}) == 4 for step, _ in tasks.batches)


def test_a_finished_run_computes_nothing_again(toy: Any, tmp_path: Path) -> None:
    expected = calm(toy.tvs, tasks=toy.tasks, run=Run(tmp_path), **RESUMED)

    class Fails:
        def logits(self, *args: object) -> Tensor:
            raise AssertionError

    found = calm(toy.tvs, tasks=Tasks(Fails(), dict(toy.tasks)), run=Run(tmp_path), **RESUMED)
    assert same(found, expected)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"share": 0.3}, {"alpha": 2.0}, {"ratio": 0.5}, {"steps": 9}, {"inner": task_arithmetic}]
)
def test_the_state_of_other_settings_is_refused(other: dict[str, Any], toy: Any, tmp_path: Path) -> None:
    calm(toy.tvs, tasks=toy.tasks, run=Run(tmp_path), **RESUMED)
    with pytest.raises(UsageError, match="holds the state of another run"):
        calm(toy.tvs, tasks=toy.tasks, run=Run(tmp_path), **(RESUMED | other))


@pytest.mark.parametrize("what", ["expert", "pool"])
def test_logits_kept_from_other_experts_or_pools_are_refused(what: str, toy: Any, tmp_path: Path) -> None:
    """Killed before the first stage was saved, only the experts' logits are there: they must not label other data."""
    with pytest.raises(KeyboardInterrupt):
        calm(toy.tvs, tasks=Changed(toy.tasks, broken=(3, 0)), run=Run(tmp_path), **RESUMED)
    tasks = toy.tasks
    if what == "expert":
        toy.experts["a"]["fc1.weight"] = -toy.experts["a"]["fc1.weight"]
    else:
        x = toy.tasks["a"].pool.dataset.tensors[0][:20]
        tasks = Tasks(toy.tasks.model, dict(toy.tasks) | {"a": Task(DataLoader(TensorDataset(x)))})
    with pytest.raises(UsageError, match="holds the state of another run"):
        calm(toy.tvs, tasks=tasks, run=Run(tmp_path), **RESUMED)


def test_the_trace_is_typed_and_whole(toy: Any) -> None:
    run = Run()
    calm(toy.tvs, tasks=toy.tasks, groups=[["a", "b", "c"], ["d"]], run=run, **QUICK)
    trace = run.trace["calm"]
    assert isinstance(trace, CalmTrace)
    assert CalmTrace.model_validate_json(trace.model_dump_json()) == trace
    (stage,) = trace.stages
    assert (stage.task, stage.seen) == ("d", ["a", "b", "c", "d"])
    assert list(stage.loss) == ["a", "b", "c", "d"]
    assert {len(curve) for curve in stage.loss.values()} == {len(stage.flips)} == {8}
    assert stage.entries == stage.histogram.total == toy.tvs.numel - 3
    assert sum(d.entries for d in stage.density) == stage.entries
    assert sum(d.share * d.entries for d in stage.density) == pytest.approx(stage.taken * stage.entries, abs=1e-3)
    assert {t: sum(c.predicted for c in classes.values()) for t, classes in trace.samplers.items()} == dict.fromkeys(
        "abcd", 30
    )


def test_a_tensor_without_entries_is_no_obstacle() -> None:
    tvs, tasks = thresholds(**FOUR)
    base = dict(tvs.base) | {"none": torch.zeros(0, 3)}
    experts = {t: dict(e) | {"none": torch.zeros(0, 3)} for t, e in tvs.experts.items()}
    delta = calm(task_vectors(base, experts), tasks=tasks, sequential=1, steps=2, ratio=1.0)
    assert delta["none"].shape == (0, 3)


def test_calm_recovers_a_known_optimum() -> None:
    """Each task reads its own entry: only the entry of the new expert's task should be taken from it."""
    n = 12
    base = {t: torch.zeros(1) for t in "abc"}
    noise = {t: {u: torch.tensor([uniform((1,), t, u).item() - 1.5]) for u in "abc"} for t in "abc"}
    experts = {t: noise[t] | {t: torch.tensor([2.0])} for t in "abc"}
    tvs = task_vectors(base, experts)
    pool = torch.linspace(-0.5, 0.9, n)[:, None]
    tasks = Tasks(Threshold(), {t: Task(DataLoader(TensorDataset(pool))) for t in "abc"})
    delta = calm(tvs, tasks=tasks, groups=[["a"], ["b"], ["c"]], ratio=1.0, lr=100.0, steps=60)
    assert {t: delta[t].item() for t in "abc"} == {"a": 2.0, "b": 2.0, "c": 2.0}
