"""ProDistill: the sheet's checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calmerge import Run, prodistill, regmean, task_arithmetic, task_vectors
from calmerge.suites.suite import load_suite
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.blocks import blocks_of, in_order
from calmerge.tasks.hf import open_suite
from calmerge.tasks.module import ModuleModel


class Deep(nn.Module):
    """Two blocks, the second registered first, and a scale outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = torch.tanh(block(x))
        return x * self.scale


def deep(tasks: int) -> tuple[Any, Tasks]:
    torch.manual_seed(0)
    base = Deep().state_dict()
    names = [chr(97 + i) for i in range(tasks)]
    experts = {t: {n: w + 0.3 * torch.randn_like(w) for n, w in base.items()} for t in names}
    pools = {t: Task(DataLoader(TensorDataset(torch.randn(40, 3)))) for t in names}
    return task_vectors(base, experts), Tasks(ModuleModel(Deep()), pools)


@pytest.mark.parametrize("per", ["element", "tensor"])
def test_one_expert_at_coefficient_one_has_no_loss_and_stays(per: Any) -> None:
    tvs, tasks = deep(1)
    run = Run()
    delta = prodistill(tvs, tasks=tasks, per=per, init=1.0, epochs=2, run=run)
    assert max(run.trace["prodistill"].loss) < 1e-10
    torch.testing.assert_close(delta["h.0.0.weight"], tvs["h.0.0.weight"][0], rtol=0, atol=0.05)


def test_tensors_outside_the_blocks_are_task_arithmetic() -> None:
    tvs, tasks = deep(2)
    delta = prodistill(tvs, tasks=tasks, epochs=3)
    torch.testing.assert_close(delta["scale"], task_arithmetic(tvs, scale=0.3)["scale"])


def test_a_model_that_computes_in_bfloat16() -> None:
    tvs, tasks = deep(2)
    half = Tasks(tasks.model, dict(tasks), autocast=torch.bfloat16)
    delta = prodistill(tvs, tasks=half, epochs=2)
    torch.testing.assert_close(dict(delta), dict(prodistill(tvs, tasks=tasks, epochs=2)), rtol=0, atol=0.05)


def test_no_epoch_is_task_arithmetic() -> None:
    tvs, tasks = deep(2)
    delta, plain = prodistill(tvs, tasks=tasks, epochs=0), task_arithmetic(tvs, scale=0.3)
    for name in plain:
        torch.testing.assert_close(delta[name], plain[name])


def test_every_block_comes_nearer_to_the_experts() -> None:
    tvs, tasks = deep(2)
    run = Run()
    prodistill(tvs, tasks=tasks, epochs=60, examples=40, run=run)
    loss = run.trace["prodistill"].loss
    half = len(loss) // 2
    for part in (loss[:half], loss[half:]):
        assert sum(part[-8:]) / 8 < 0.8 * sum(part[:2]) / 2


def test_a_linear_first_block_goes_to_regmean_s_solution() -> None:
    """x0 = x1 = x there, so the optimum over all matrices is RegMean's; the elementwise span of two experts holds it
    up to where both agree."""
    tvs, tasks = deep(2)
    ours = prodistill(tvs, tasks=tasks, epochs=500, examples=40, lr=0.1, batch=40)["h.0.0.weight"]
    plain = regmean(tvs, tasks=tasks, ratio=1.0, damping=0.0)["h.0.0.weight"]
    start = task_arithmetic(tvs, scale=0.3)["h.0.0.weight"]
    assert (ours - plain).norm() < 0.25 * (start - plain).norm()


def test_blocks_are_taken_in_the_order_of_the_forward_pass() -> None:
    tvs, tasks = deep(1)
    blocks = blocks_of(tasks.model, tvs.base, tvs)
    weights = {n: tvs.base.read(n) for n in tvs}
    assert [b.path for b in in_order(blocks[::-1], tasks.model, tasks, "a", weights)] == ["h.0", "h.1"]


def test_a_model_without_blocks_is_one_block(toy: Any) -> None:
    (block,) = blocks_of(toy.tasks.model, toy.tvs.base, toy.tvs)
    assert block.path == ""
    assert "fc1.weight" in block.tensors


def test_a_transformer_of_hugging_face(tiny_suite: Path) -> None:
    tvs, tasks = open_suite(load_suite(tiny_suite))
    run = Run()
    prodistill(tvs, tasks=tasks, epochs=20, examples=16, run=run)
    loss = run.trace["prodistill"].loss
    assert len(loss) == 2 * 20  # two blocks, one batch a task
    assert loss[19] < loss[0]
    assert loss[39] < loss[20]
