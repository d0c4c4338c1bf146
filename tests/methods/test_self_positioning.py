"""Self Positioning: the sheet's checks and traps, on a toy encoder and on a real tokenizer and sentence encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calmerge import DataError, Run, TaskVectors, average, self_positioning, task_vectors
from calmerge.methods.self_positioning import in_batch
from calmerge.pieces import blend
from calmerge.tasks.base import Batch, Task, Tasks
from calmerge.tasks.embeddings import EmbeddingModel, Pairs, first_token, text_pairs


def problem(first: float = 1.0, second: float = -1.0, *, only: str | None = None) -> tuple[TaskVectors, Tasks]:
    """Expert `a` turns queries onto their positives; expert `b` turns them away."""
    torch.manual_seed(0)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    tvs = task_vectors(
        {"weight": torch.eye(2)},
        {"a": {"weight": torch.eye(2) + first * turn}, "b": {"weight": torch.eye(2) + second * turn}},
    )
    probes = {}
    for task, sign in (("a", 1.0), ("b", 1.0 if only else -1.0)):
        x = torch.randn(40, 2)
        y = x @ (torch.eye(2) + sign * turn).T
        probes[task] = Task(Halves(x, y))
    return tvs, Tasks(Sided(nn.Linear(2, 2, bias=False)), probes)


class Halves(Pairs):
    """Pairs whose positives are embedded as they are."""


class Sided(EmbeddingModel):
    """Only queries pass the encoder, so that one matrix is to be found."""

    def logits(self, weights: Any, inputs: Any, task: str) -> torch.Tensor:
        query = self.embed(weights, inputs["query"])
        return query @ torch.nn.functional.normalize(inputs["positive"], dim=-1).T / self.temperature


def test_no_update_gives_the_average_and_not_the_sum() -> None:
    tvs, tasks = problem()
    torch.testing.assert_close(self_positioning(tvs, tasks=tasks, steps=0)["weight"], average(tvs)["weight"])


def test_free_coefficients_start_at_the_average_too() -> None:
    tvs, tasks = problem()
    found = self_positioning(tvs, tasks=tasks, steps=0, mode="free")
    torch.testing.assert_close(found["weight"], average(tvs)["weight"])


def test_the_coefficient_of_the_expert_that_fits_rises() -> None:
    tvs, tasks = problem(only="a")
    run = Run()
    self_positioning(tvs, tasks=tasks, steps=1, hold_out=0.0, run=run)
    ((a, b),) = run.trace["self_positioning"].coefficients.values
    assert a > 0.5 > b
    assert a + b == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["simplex_scaled", "free"])
def test_other_modes_leave_the_simplex(mode: Any) -> None:
    tvs, tasks = problem(only="a")
    run = Run()
    self_positioning(tvs, tasks=tasks, steps=20, mode=mode, hold_out=0.0, run=run)
    ((a, b),) = run.trace["self_positioning"].coefficients.values
    assert a > b
    assert abs(a + b - 1) > 1e-3 or (mode == "free" and b < 0)


def test_two_equal_experts_leave_the_coefficients_alone() -> None:
    tvs, tasks = problem(1.0, 1.0)
    run = Run()
    self_positioning(tvs, tasks=tasks, steps=5, hold_out=0.0, run=run)
    ((a, b),) = run.trace["self_positioning"].coefficients.values
    assert a == pytest.approx(0.5, abs=1e-3)
    assert b == pytest.approx(0.5, abs=1e-3)


def test_the_gradient_is_that_of_finite_differences() -> None:
    tvs, tasks = problem()
    batch = Batch("a", torch.arange(16))

    def loss(a: torch.Tensor) -> float:
        return sum(tasks.loss(in_batch, {"weight": tvs.base["weight"] + blend(tvs, a)["weight"]}, [batch]).values())

    point = torch.tensor([0.3, 0.4])
    theta = {"weight": (tvs.base["weight"] + blend(tvs, point)["weight"]).requires_grad_()}
    tasks.gradient(in_batch, lambda step: iter([batch]))(theta, 0)
    assert theta["weight"].grad is not None
    for t, tau in enumerate(tvs["weight"]):
        step = torch.zeros(2)
        step[t] = 1e-2
        numeric = (loss(point + step) - loss(point - step)) / 2e-2
        assert (theta["weight"].grad * tau).sum().item() == pytest.approx(numeric, rel=2e-2, abs=1e-3)


def test_tasks_count_alike_whatever_their_number_of_pairs() -> None:
    tvs, tasks = problem()
    small = {t: Task(Halves(tasks[t].pool.query[:n], tasks[t].pool.positive[:n])) for t, n in (("a", 40), ("b", 8))}
    run = Run()
    self_positioning(tvs, tasks=Tasks(tasks.model, small), steps=3, batch=8, hold_out=0.0, run=run)
    assert {t: len(losses) for t, losses in run.trace["self_positioning"].per_task.items()} == {"a": 3, "b": 3}


def test_hard_negatives_stand_behind_the_positives() -> None:
    model = EmbeddingModel(nn.Linear(2, 2, bias=False), temperature=1.0)
    batch = {"query": torch.eye(2), "positive": torch.eye(2), "negatives": -torch.eye(2)}
    assert model.logits({"weight": torch.eye(2)}, batch, "t").tolist() == [[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"every query needs its positive and its negatives; found \{'query': 2"):
        Pairs(torch.zeros(2, 1), torch.zeros(3, 1))


def test_a_sentence_encoder_with_its_tokenizer(tiny_suite: Path) -> None:
    """A small BERT made by the tests, experts of one encoder, pairs of texts; [CLS] or mean pooling."""
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_suite.parent
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tvs = task_vectors(folder / "base", {t: folder / "experts" / t for t in ("colours", "shapes")})
    rows = [(f"w{i} w{i + 1}", f"w{i} w{i + 2}") for i in range(20)]
    probes = {t: Task(text_pairs(tokenizer, rows)) for t in tvs.tasks}
    for pool in (None, first_token):
        model = EmbeddingModel(AutoModel.from_pretrained(folder / "base"), pool=pool)
        run = Run()
        delta = self_positioning(tvs, tasks=Tasks(model, probes), steps=3, batch=8, run=run)
        assert len(delta) == len(tvs)
        assert len(run.trace["self_positioning"].held_out) >= 2


def test_rows_of_texts_must_be_pairs() -> None:
    with pytest.raises(DataError, match=r"every row must be \(query, positive\)"):
        text_pairs(None, [("a",)])
