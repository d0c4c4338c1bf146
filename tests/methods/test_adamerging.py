"""AdaMerging: the traps and worked checks of its specification."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from calmerge import FitError, Run, TaskVectors, UsageError, adamerging, adamerging_pp, task_arithmetic, task_vectors
from calmerge.fitting import entropy
from calmerge.methods.ties import ties_split
from calmerge.pieces import blend
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Batch, Task, Tasks


class Scalar:
    """Two classes whose logits are (w, 0) whatever the input."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: str) -> Tensor:
        w = weights["w"].sum().expand(len(inputs))
        return torch.stack([w, torch.zeros_like(w)], 1)


def scalar(**kinds: Any) -> tuple[TaskVectors, Tasks]:
    """One expert at 2 over a base at 0, so that the logit is 2 lambda."""
    tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([2.0])}})
    return tvs, Tasks(Scalar(), {"a": Task(DataLoader(TensorDataset(torch.zeros(40, 1))))})


def learned(tvs: TaskVectors, tasks: Tasks, **options: Any) -> list[list[float]]:
    """The coefficients, one row per tensor."""
    run = Run()
    adamerging(tvs, tasks=tasks, run=run, **options)
    return run.trace["adamerging"].coefficients.values


def test_entropy_is_minimised_not_maximised() -> None:
    """d H / d lambda = -0.2745 at 0.3, so the first step of Adam goes up by lr; a wrong sign gives 0.299."""
    tvs, tasks = scalar()
    (((coefficient,),)) = learned(tvs, tasks, per="task", steps=1)
    assert coefficient == pytest.approx(0.301, abs=1e-6)
    theta = {"w": torch.tensor([0.6]).requires_grad_()}
    tasks.gradient(entropy, lambda step: iter([Batch("a", torch.arange(4))]))(theta, 0)
    assert 2 * theta["w"].grad.item() == pytest.approx(-0.2745, abs=1e-4)


@pytest.mark.parametrize(("raw", "used"), [(1.2, 1.0), (-0.1, 0.0)])
def test_the_used_coefficient_is_clamped_not_the_raw_one(raw: float, used: float) -> None:
    tvs, tasks = scalar()
    run = Run()
    delta = adamerging(tvs, tasks=tasks, init=raw, per="task", steps=3, lr=0.01, run=run)
    assert delta["w"].item() == pytest.approx(2 * used)
    assert run.trace["adamerging"].coefficients.values[0][0] == pytest.approx(raw)  # its gradient is exactly 0 there


def test_without_clamping_coefficients_may_leave_the_range() -> None:
    tvs, tasks = scalar()
    assert adamerging(tvs, tasks=tasks, init=1.2, per="task", clamp=False, steps=0)["w"].item() == pytest.approx(2.4)
    (((coefficient,),)) = learned(tvs, tasks, init=1.2, per="task", clamp=False, steps=3, lr=0.01)
    assert coefficient > 1.2


def test_a_raw_coefficient_moves_on_while_inside_and_is_used_clamped_once_outside() -> None:
    tvs, tasks = scalar()
    run = Run()
    delta = adamerging(tvs, tasks=tasks, init=0.95, per="task", steps=5, lr=0.1, run=run)
    raw = run.trace["adamerging"].coefficients.values[0][0]
    assert raw > 1.05  # the first step left the range; Adam's momentum carried it on
    assert delta["w"].item() == 2.0


def test_without_steps_it_is_task_arithmetic_at_the_start(toy: Any) -> None:
    for per in ("task", "tensor"):
        delta = adamerging(toy.tvs, tasks=toy.tasks, per=per, steps=0)
        expected = task_arithmetic(toy.tvs, scale=0.3)
        for name in delta:
            torch.testing.assert_close(delta[name], expected[name], rtol=1e-6, atol=1e-7)


def test_layer_wise_with_equal_rows_is_task_wise_bit_for_bit(toy: Any) -> None:
    lam = torch.tensor([0.1, 0.35, 0.7, 0.2])
    task_wise, layer_wise = blend(toy.tvs, lam), blend(toy.tvs, lambda name: lam)
    for name in toy.tvs:
        assert torch.equal(task_wise[name], layer_wise[name])
    zero = [adamerging(toy.tvs, tasks=toy.tasks, per=per, steps=0, init=0.37) for per in ("task", "tensor")]
    assert all(torch.equal(zero[0][n], zero[1][n]) for n in toy.tvs)


def test_every_tensor_has_a_row_of_its_own_weights_biases_and_norms(toy: Any) -> None:
    run = Run()
    adamerging(toy.tvs, tasks=toy.tasks, steps=1, batch=8, run=run)
    trace = run.trace["adamerging"]
    assert isinstance(trace, FitTrace)
    assert trace.coefficients.tensors == list(toy.tvs)
    assert trace.coefficients.tasks == ["a", "b", "c", "d"]
    assert len({tuple(row) for row in trace.coefficients.values}) > 3


def test_tensors_without_a_gradient_keep_the_start(toy: Any) -> None:
    coefficients = dict(zip(toy.tvs, learned(toy.tvs, toy.tasks, steps=4, batch=8, lr=0.05), strict=True))
    assert coefficients["unused"] == [torch.tensor(0.3).item()] * 4
    assert all(abs(c - 0.3) > 0.01 for c in coefficients["fc1.weight"])


def test_coefficients_go_on_moving_after_the_first_update(toy: Any) -> None:
    """A rewrite that caches the merged weights stops updating them: its loss does not change any more."""
    run = Run()
    adamerging(toy.tvs, tasks=toy.tasks, steps=12, batch=30, batches=1, lr=0.02, run=run)
    loss = run.trace["adamerging"].loss
    assert len(set(loss)) == 12
    assert loss[-1] < loss[0] - 0.05
    one, two = (learned(toy.tvs, toy.tasks, steps=s, batch=8)[0][0] for s in (1, 2))
    assert one != two


def test_losses_are_summed_over_tasks_and_batches(toy: Any) -> None:
    run = Run()
    adamerging(toy.tvs, tasks=toy.tasks, steps=1, batch=30, batches=3, run=run)
    start = {n: toy.base[n] + task_arithmetic(toy.tvs)[n] for n in toy.tvs}
    each = {t: entropy(toy.tasks.logits(start, t)).item() for t in toy.tasks}
    trace = run.trace["adamerging"]
    assert trace.per_task == {t: [pytest.approx(3 * h, abs=1e-4)] for t, h in each.items()}
    assert trace.loss[0] == pytest.approx(3 * sum(each.values()), abs=1e-4)


def test_labels_are_never_used(toy: Any) -> None:
    expected = adamerging(toy.tvs, tasks=toy.tasks, steps=3, batch=8)
    labelled = {}
    for t in toy.tasks:
        (x,) = toy.tasks[t].pool.dataset.tensors
        labelled[t] = Task(DataLoader(TensorDataset(x, torch.full((len(x),), -7))))
    found = adamerging(toy.tvs, tasks=Tasks(toy.tasks.model, labelled), steps=3, batch=8)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_heads_are_frozen(toy: Any) -> None:
    before = {t: head.weight.clone() for t, head in toy.heads.items()}
    adamerging(toy.tvs, tasks=toy.tasks, steps=3, batch=8, lr=0.1)
    assert all(torch.equal(head.weight, before[t]) and head.weight.grad is None for t, head in toy.heads.items())


def test_pp_weighs_the_filtered_vectors_and_does_not_sum_them() -> None:
    a, b = torch.tensor([3.0, -1, 2, 0, 0]), torch.tensor([-2.0, -4, 0, 0, 1])
    tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": a}, "b": {"w": b}})
    tasks = Tasks(Scalar(), {t: Task(DataLoader(TensorDataset(torch.zeros(4, 1)))) for t in "ab"})
    start = adamerging_pp(tvs, tasks=tasks, keep=0.4, steps=0)
    torch.testing.assert_close(start["w"], 0.3 * torch.tensor([3.0, -5, 2, 0, 1]))
    run = Run()
    delta = adamerging_pp(tvs, tasks=tasks, keep=0.4, steps=3, per="task", lr=0.1, run=run)
    lam = torch.tensor(run.trace["adamerging"].coefficients.values[0])
    torch.testing.assert_close(delta["w"], lam @ torch.tensor([[3.0, -1, 2, 0, 0], [0, -4, 0, 0, 1]]))
    assert lam[0] != lam[1]


def test_pp_is_adamerging_over_the_split(toy: Any) -> None:
    found = adamerging_pp(toy.tvs, tasks=toy.tasks, keep=0.3, steps=3, batch=8)
    expected = adamerging(ties_split(toy.tvs, keep=0.3), tasks=toy.tasks, steps=3, batch=8)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_loss_that_is_not_finite_names_task_and_update(toy: Any) -> None:
    toy.heads["c"].weight.data[0, 0] = float("nan")
    with pytest.raises(FitError, match="update 1: the loss of task 'c' is nan"):
        adamerging(toy.tvs, tasks=toy.tasks, steps=2, batch=8)


class Breaks(Tasks):
    """Tasks whose gradient breaks down at one update."""

    at = 10**9

    def gradient(self, objective: Any, batches: Any) -> Any:
        inner = super().gradient(objective, batches)

        def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
            if step == self.at:
                raise KeyboardInterrupt
            return inner(theta, step)

        return gradient


@pytest.mark.parametrize("method", [adamerging, adamerging_pp])
def test_an_interrupted_run_goes_on_and_ends_the_same(method: Any, toy: Any, tmp_path: Path, save_always: None) -> None:
    options = {"steps": 5, "batch": 8, "lr": 0.05}
    expected = method(toy.tvs, tasks=toy.tasks, **options)
    tasks = Breaks(toy.tasks.model, dict(toy.tasks))
    tasks.at = 3
    with pytest.raises(KeyboardInterrupt):
        method(toy.tvs, tasks=tasks, run=Run(tmp_path), **options)
    found = method(toy.tvs, tasks=toy.tasks, run=Run(tmp_path), **options)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("first", [{}, {"keep": 0.5}])
def test_another_method_s_state_is_refused_not_resumed(first: dict[str, float], toy: Any, tmp_path: Path) -> None:
    """AdaMerging, AdaMerging++ and another share kept differ in their task vectors alone."""
    method = adamerging_pp if first else adamerging
    method(toy.tvs, tasks=toy.tasks, steps=1, batch=8, run=Run(tmp_path), **first)
    with pytest.raises(UsageError, match="holds the state of another run"):
        adamerging_pp(toy.tvs, tasks=toy.tasks, steps=1, batch=8, run=Run(tmp_path))


def test_the_state_of_other_settings_is_refused(toy: Any, tmp_path: Path) -> None:
    adamerging(toy.tvs, tasks=toy.tasks, steps=1, batch=8, run=Run(tmp_path))
    with pytest.raises(UsageError, match="holds the state of another run"):
        adamerging(toy.tvs, tasks=toy.tasks, steps=1, batch=8, seed=1, run=Run(tmp_path))
