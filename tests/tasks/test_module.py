"""Any torch module as a model of several tasks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from calmerge import DataError
from calmerge.fitting import entropy
from calmerge.tasks.base import Batch, Task, Tasks
from calmerge.tasks.module import ModuleModel


class Pair(nn.Module):
    """Two inputs, a dropout, and a module's usual output object."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.fixed = nn.Parameter(torch.ones(2))
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.drop(self.w * x + self.fixed * y)


WEIGHTS = {"w": torch.tensor([2.0, 3.0])}
X, Y = torch.ones(1, 2), torch.full((1, 2), 0.5)


def test_mappings_become_keyword_arguments_and_tuples_positional_ones() -> None:
    model = ModuleModel(Pair())
    for inputs in ({"y": Y, "x": X}, (X, Y), [X, Y]):
        assert model.logits(WEIGHTS, inputs, "any").tolist() == [[2.5, 3.5]]


def test_weights_that_are_not_given_are_the_module_s_own() -> None:
    module = Pair()
    module.fixed.data = torch.tensor([10.0, 0.0])
    assert ModuleModel(module).logits(WEIGHTS, (X, Y), "any").tolist() == [[7.0, 3.0]]


def test_the_module_is_in_evaluation_mode_and_its_weights_are_not_changed() -> None:
    module = Pair()
    logits = ModuleModel(module).logits(WEIGHTS, (X, Y), "any")
    assert logits.tolist() == [[2.5, 3.5]]  # no dropout
    assert module.w.tolist() == [1.0, 1.0]


def test_an_output_object_s_logits_are_taken() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Wrapped(Pair):
        def forward(self, x: Tensor, y: Tensor) -> Output:
            return Output(super().forward(x, y))

    assert ModuleModel(Wrapped()).logits(WEIGHTS, (X, Y), "any").tolist() == [[2.5, 3.5]]


def test_every_task_has_its_head_which_is_never_changed() -> None:
    heads = {"a": nn.Linear(2, 3, bias=False), "sum": lambda features: features.sum(1, keepdim=True)}
    model = ModuleModel(Pair(), heads)
    assert model.logits(WEIGHTS, (X, Y), "a").shape == (1, 3)
    assert model.logits(WEIGHTS, (X, Y), "sum").tolist() == [[6.0]]
    assert not heads["a"].weight.requires_grad


def test_a_task_without_a_head_is_named() -> None:
    with pytest.raises(DataError, match="task 'b' has no head; heads are given for a"):
        ModuleModel(Pair(), {"a": nn.Identity()}).logits(WEIGHTS, (X, Y), "b")


def test_gradients_reach_the_weights_given_and_nothing_of_the_module() -> None:
    """Tensors that are not merged would otherwise gather a gradient over all updates."""
    module = Pair()

    class Inputs:
        def __len__(self) -> int:
            return 1

        def batch(self, indices: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
            return (X, Y), None

    tasks = Tasks(ModuleModel(module), {"a": Task(Inputs())})
    theta = {"w": WEIGHTS["w"].clone().requires_grad_()}
    tasks.gradient(entropy, lambda step: iter([Batch("a", torch.tensor([0]))]))(theta, 0)
    assert theta["w"].grad is not None
    assert module.fixed.grad is None
    assert module.w.grad is None


def test_weights_that_the_module_does_not_have_are_left_out() -> None:
    weights = WEIGHTS | {"classifier.weight": torch.ones(3, 2), "stray": torch.ones(1)}
    assert ModuleModel(Pair()).logits(weights, (X, Y), "any").tolist() == [[2.5, 3.5]]


def test_a_module_that_has_none_of_the_weights_is_refused() -> None:
    with pytest.raises(DataError, match=r"they are named 'encoder.w', its own 'fixed'"):
        ModuleModel(Pair()).logits({"encoder.w": torch.ones(2)}, (X, Y), "any")


def test_tied_tensors_are_known_by_both_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    assert ModuleModel(module).logits({"1.weight": torch.zeros(2, 2)}, X, "any").tolist() == [[0.0, 0.0]]
