"""A model and its tasks: forward passes, gradients, evaluation, and data that will not do."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from calmerge import DataError, FitError, UsageError
from calmerge.fitting import pseudo_label
from calmerge.tasks.base import Batch, Task, Tasks


class Examples:
    """Rows of a matrix, with labels or without, that remembers what it was asked for."""

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        self.x, self.labels, self.asked = x, labels, []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        self.asked.append(indices.tolist())
        return self.x[indices], None if self.labels is None else self.labels[indices]


class Linear:
    """logits = x W, whatever the task."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: str) -> Tensor:
        return inputs @ weights["w"]


X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
W = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}


def problem(**tasks: Task) -> Tasks:
    return Tasks(Linear(), tasks)


def test_logits_come_in_the_order_of_the_split_whatever_the_batch() -> None:
    for batch in (1, 2, 64):
        examples = Examples(X)
        tasks = Tasks(Linear(), {"a": Task(examples)}, batch=batch)
        assert torch.equal(tasks.logits(W, "a"), X @ W["w"])
        assert [i for batch in examples.asked for i in batch] == [0, 1, 2]


def test_a_loader_stands_for_its_data_in_their_order() -> None:
    tasks = problem(a=Task(DataLoader(TensorDataset(X), batch_size=2, shuffle=True, drop_last=True)))
    assert torch.equal(tasks.logits(W, "a"), X @ W["w"])


def test_gradients_are_summed_over_batches_and_tasks_not_averaged() -> None:
    tasks = problem(a=Task(Examples(X)), b=Task(Examples(2 * X)))
    target = torch.tensor([0])

    def gradient_of(*batches: Batch) -> tuple[Tensor, dict[str, float]]:
        theta = {"w": W["w"].clone().requires_grad_()}
        losses = tasks.gradient(pseudo_label, lambda step: iter(batches))(theta, 0)
        return theta["w"].grad, losses

    one, two, three = (Batch("a", torch.tensor([i]), target) for i in (0, 1, 2))
    other = Batch("b", torch.tensor([1]), target)
    parts = [gradient_of(b) for b in (one, two, other)]
    whole, losses = gradient_of(one, two, other)
    torch.testing.assert_close(whole, parts[0][0] + parts[1][0] + parts[2][0])
    assert losses["a"] == pytest.approx(parts[0][1]["a"] + parts[1][1]["a"])
    assert losses["b"] == pytest.approx(parts[2][1]["b"])
    both = Batch("a", torch.tensor([1, 2]), torch.tensor([0, 0]))  # within a batch it is the mean
    torch.testing.assert_close(gradient_of(both)[0], (gradient_of(two)[0] + gradient_of(three)[0]) / 2)


def test_labels_of_a_pool_never_reach_the_objective() -> None:
    seen: list[Tensor | None] = []

    def objective(logits: Tensor, targets: Tensor | None) -> Tensor:
        seen.append(targets)
        return logits.sum()

    tasks = problem(a=Task(Examples(X, torch.tensor([0, 1, 1]))))
    theta = {"w": W["w"].clone().requires_grad_()}
    tasks.gradient(objective, lambda step: iter([Batch("a", torch.tensor([0, 1]))]))(theta, 0)
    assert seen == [None]


def test_a_loss_that_is_not_finite_names_task_and_update() -> None:
    tasks = problem(a=Task(Examples(X)), b=Task(Examples(X * float("inf"))))
    theta = {"w": W["w"].clone().requires_grad_()}
    batches = [Batch(t, torch.tensor([0]), torch.tensor([0])) for t in "ab"]
    with pytest.raises(FitError, match="update 5: the loss of task 'b' is nan"):
        tasks.gradient(pseudo_label, lambda step: iter(batches))(theta, 4)


def test_a_loss_that_does_not_depend_on_the_weights_is_refused() -> None:
    tasks = problem(cars=Task(Examples(X)))
    theta = {"w": W["w"].clone(), "merged": torch.ones(1).requires_grad_()}
    with pytest.raises(DataError, match="task 'cars': its loss depends on none of the merged tensors"):
        tasks.gradient(lambda logits, _: logits.sum(), lambda step: iter([Batch("cars", torch.tensor([0]))]))(theta, 0)


def test_evaluation_counts_right_answers_and_predictions() -> None:
    tasks = problem(a=Task(Examples(X), test=Examples(X, torch.tensor([0, 0, 1]))))
    score = tasks.evaluate(W)["a"]
    assert (score.accuracy, score.n, score.predicted) == (pytest.approx(2 / 3), 3, [1, 2])


def test_validation_is_a_split_of_its_own() -> None:
    tasks = problem(
        a=Task(Examples(X), test=Examples(X, torch.zeros(3).long()), validation=Examples(X[1:], torch.tensor([1, 1])))
    )
    assert tasks.evaluate(W, "validation")["a"].accuracy == 1.0
    assert tasks.evaluate(W)["a"].accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(("labels", "bad"), [([0, 1, 2], 2), ([0, -1, 1], -1)])
def test_a_label_out_of_range_is_named(labels: list[int], bad: int) -> None:
    tasks = problem(a=Task(Examples(X), test=Examples(X, torch.tensor(labels))))
    with pytest.raises(DataError, match=rf"task 'a': test has label {bad}, but the head has 2 outputs \(0 to 1\)"):
        tasks.evaluate(W)


def test_a_split_without_labels_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="task 'a': test has no labels"):
        problem(a=Task(Examples(X), test=Examples(X))).evaluate(W)


def test_a_missing_split_is_named() -> None:
    with pytest.raises(DataError, match="task 'a' has no validation split"):
        problem(a=Task(Examples(X))).evaluate(W, "validation")


@pytest.mark.parametrize("empty", [Examples(X[:0]), DataLoader(TensorDataset(X[:0]))])
def test_an_empty_pool_is_refused_at_once(empty: Any) -> None:
    with pytest.raises(DataError, match="task 'cars': its pool is empty"):
        problem(cars=Task(empty))


def test_an_empty_test_split_is_refused() -> None:
    with pytest.raises(DataError, match="task 'cars': its test split is empty"):
        problem(cars=Task(Examples(X), test=Examples(X[:0], torch.zeros(0).long()))).evaluate(W)


def test_a_split_that_cannot_give_batches_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"task 'cars': its pool must be a DataLoader, .* got 'list'"):
        problem(cars=Task([X]))  # type: ignore[arg-type]


def test_a_transductive_task_has_a_test_split() -> None:
    with pytest.raises(DataError, match="task 'cars' is called transductive but has no test split"):
        problem(cars=Task(Examples(X), transductive=True))


def test_an_unknown_task_names_the_closest() -> None:
    tasks = problem(cars=Task(Examples(X)))
    assert (list(tasks), len(tasks)) == (["cars"], 1)
    with pytest.raises(UsageError, match=r"no task 'carz'. Did you mean 'cars'\?"):
        tasks.logits(W, "carz")


def test_lower_precision_is_asked_for_and_gradients_stay_float32() -> None:
    tasks = Tasks(Linear(), {"a": Task(Examples(X))}, autocast=torch.bfloat16)
    theta = {"w": torch.tensor([[1.001, 0.0], [0.0, 2.0]]).requires_grad_()}
    assert tasks.logits(theta, "a")[0, 0].item() == 1.0
    tasks.gradient(pseudo_label, lambda step: iter([Batch("a", torch.tensor([0]), torch.tensor([1]))]))(theta, 0)
    assert theta["w"].grad.dtype == torch.float32


def test_a_model_that_fails_is_named_with_its_task() -> None:
    tasks = problem(cars=Task(Examples(X)))
    with pytest.raises(DataError, match=r"task 'cars': the model fails on its inputs .*: RuntimeError: mat1 and mat2"):
        tasks.logits({"w": torch.ones(5, 2)}, "cars")
    with pytest.raises(DataError, match="KeyError: 'w'"):
        tasks.gradient(pseudo_label, lambda step: iter([Batch("cars", torch.tensor([0]))]))({}, 0)
