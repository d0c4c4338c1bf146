"""What the trials change: a pool cut short, a head that is too loud, an expert half trained, a drawn order."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import task_vectors
from calmerge.tasks.base import Outputs

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

trials = pytest.importorskip("trials")


class Numbers:
    def __len__(self) -> int:
        return 10

    def batch(self, indices: Tensor) -> tuple[Tensor, None]:
        return indices * 1.0, None


class Same:
    def outputs(self, weights: Any, inputs: Tensor, task: str) -> Outputs:
        return Outputs(inputs, inputs)


def test_a_pool_cut_short_holds_its_first_examples() -> None:
    assert len(trials.first(Numbers(), 3)) == 3
    assert len(trials.first(Numbers(), 64)) == 10
    assert trials.first(Numbers(), 3).batch(torch.tensor([2]))[0].tolist() == [2.0]


def test_only_the_named_heads_are_loud_and_features_stay() -> None:
    model = trials.Loud(Same(), ["a"])
    x = torch.tensor([[1.0, -1.0]])
    assert model.logits({}, x, "a").tolist() == [[4.0, -4.0]]
    assert model.outputs({}, x, "a").features.tolist() == [[1.0, -1.0]]
    assert model.logits({}, x, "b").tolist() == [[1.0, -1.0]]


def test_a_weakened_expert_is_half_way_back_and_the_others_stay() -> None:
    tvs = task_vectors({"w": torch.tensor([1.0])}, {"a": {"w": torch.tensor([3.0])}, "b": {"w": torch.tensor([5.0])}})
    weak = trials.weakened(tvs, ["a"])
    assert weak.expert("a")["w"].tolist() == [2.0]
    assert weak.expert("b")["w"].tolist() == [5.0]
    assert weak.read("w").tolist() == [[1.0], [4.0]]


def test_trials_that_differ_in_anything_lie_in_different_files() -> None:
    designs = [trial for design in trials.DESIGNS.values() for trial in design("vision")]
    assert len({trial.key for trial in designs}) == len(set(designs))
