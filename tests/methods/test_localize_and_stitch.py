"""Localize-and-Stitch: the sheet's checks and traps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import Run, localize_and_stitch, localize_and_stitch_dataless, task_vectors
from calmerge.pieces.mask import pack
from calmerge.pieces.stitch import stitch

TAU = {"a": [3.0, 2.0, 5.0], "b": [6.0, 7.0, 1.0], "c": [0.0, 4.0, 9.0]}
MASKS = {"a": [1, 1, 0], "b": [1, 0, 1], "c": [1, 1, 0]}


def vectors(*names: str) -> Any:
    return task_vectors({"w": torch.zeros(3)}, {n: {"w": torch.tensor(TAU[n])} for n in names})


def masks(*names: str) -> dict[str, dict[str, Tensor]]:
    return {n: {"w": pack(torch.tensor(MASKS[n]).bool())} for n in names}


def test_overlaps_are_averaged() -> None:
    assert stitch(vectors("a", "b", "c"), masks("a", "b", "c"))["w"].tolist() == [3.0, 3.0, 1.0]


def test_one_task_is_not_averaged() -> None:
    assert stitch(vectors("b"), masks("b"))["w"].tolist() == [6.0, 0.0, 1.0]


def test_a_full_mask_gives_the_expert() -> None:
    assert stitch(vectors("b"), {"b": {"w": pack(torch.ones(3).bool())}})["w"].tolist() == TAU["b"]


def test_the_order_of_tasks_does_not_matter() -> None:
    one, two = (
        stitch(vectors("a", "b", "c"), masks("a", "b", "c")),
        stitch(vectors("c", "a", "b"), masks("a", "b", "c")),
    )
    assert torch.equal(one["w"], two["w"])


def test_a_task_with_an_empty_mask_changes_nothing() -> None:
    empty = {"c": {"w": pack(torch.zeros(3).bool())}}
    assert torch.equal(
        stitch(vectors("a", "b", "c"), masks("a", "b") | empty)["w"], stitch(vectors("a", "b"), masks("a", "b"))["w"]
    )


def test_a_tensor_without_a_mask_is_the_base_s() -> None:
    assert stitch(vectors("a"), {"a": {}})["w"].tolist() == [0.0, 0.0, 0.0]


def test_five_percent_of_a_thousand_are_fifty_entries() -> None:
    tau = torch.arange(1, 1001).float() / 1000
    found = localize_and_stitch_dataless(task_vectors({"w": torch.zeros(1000)}, {"a": {"w": tau}}), keep=0.05)["w"]
    assert int((found != 0).sum()) == 50
    assert torch.equal(found[950:], tau[950:])


def test_without_data_at_least_one_entry_is_kept() -> None:
    tau = torch.tensor([1.0, -3.0, 2.0])
    found = localize_and_stitch_dataless(task_vectors({"w": torch.zeros(3)}, {"a": {"w": tau}}), keep=0.01)["w"]
    assert found.tolist() == [0.0, -3.0, 0.0]


def test_the_threshold_is_global_and_not_per_tensor() -> None:
    tau = {"big": torch.tensor([5.0, 6.0]), "small": torch.tensor([0.1, 0.2])}
    tvs = task_vectors({n: torch.zeros(2) for n in tau}, {"a": tau})
    found = localize_and_stitch_dataless(tvs, keep=0.5)
    assert found["big"].tolist() == [5.0, 6.0]
    assert found["small"].tolist() == [0.0, 0.0]


def test_every_task_is_localised_on_its_own_loss(toy: Any) -> None:
    run = Run()
    localize_and_stitch(toy.tvs, tasks=toy.tasks, steps=3, batch=8, run=run)
    stages = run.trace["localize_and_stitch"].stages
    assert [(stage.task, stage.seen) for stage in stages] == [(t, [t]) for t in toy.tvs.tasks]
    assert all(len(stage.loss[stage.task]) == 3 for stage in stages)


def test_the_density_of_a_mask_is_reported(toy: Any) -> None:
    """A mask may take more than the entries it starts with."""
    run = Run()
    localize_and_stitch(toy.tvs.only(["a"]), tasks=toy.tasks, steps=40, share=0.3, batch=8, run=run)
    assert run.trace["localize_and_stitch"].stages[0].taken > 0.05


def test_entries_of_the_mask_have_the_expert_s_value_and_others_the_base_s(toy: Any) -> None:
    tvs = toy.tvs.only(["a"])
    delta = localize_and_stitch(tvs, tasks=toy.tasks, steps=40, share=0.3, batch=8)
    for name in delta:
        taken = delta[name] != 0
        assert torch.equal(delta[name][taken], tvs[name][0][taken])


def test_frozen_tensors_keep_the_base_s_values(toy: Any) -> None:
    delta = localize_and_stitch(toy.tvs, tasks=toy.tasks, steps=20, share=0.3, batch=8, frozen=["fc1.*"])
    assert not delta["fc1.weight"].any()
    assert delta["fc2.weight"].any()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_task_s_mask_does_not_depend_on_the_other_tasks(seed: int, toy: Any) -> None:
    options = {"tasks": toy.tasks, "steps": 20, "share": 0.3, "batch": 8, "seed": seed}
    runs = Run(), Run()
    localize_and_stitch(toy.tvs, **options, run=runs[0])
    localize_and_stitch(toy.tvs.only(["b"]), **options, run=runs[1])
    alone = runs[1].trace["localize_and_stitch"].stages[0]
    assert alone in runs[0].trace["localize_and_stitch"].stages
