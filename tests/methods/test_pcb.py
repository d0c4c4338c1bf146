"""PCB: the worked checks of its specification."""

from functools import partial

import pytest
import torch

from calmerge import TaskVectors, pcb, task_vectors
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=1e-4)


def vectors(*rows: list[float]) -> TaskVectors:
    return task_vectors({"w": torch.zeros(len(rows[0]))}, {f"t{i}": {"w": torch.tensor(r)} for i, r in enumerate(rows)})


X = ([1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -0.5, 2.0])


def test_only_the_entry_of_greatest_balance_stays() -> None:
    """beta of the first task is [.2571, .3037, 0, 11.2549]; at a half its third smallest is the cut."""
    near(pcb(vectors(*X), keep=0.5, clip=0.0, scale=1.0)["w"], torch.tensor([0, 0, 0, 2.5]))


def test_weights_are_those_of_the_search_script_s_agreement() -> None:
    """keep=1 cuts at 0: the first task weighs [.2571, .3037, 0, 11.2549] / 11.2549; 1 against -2 is cut."""
    tau = torch.tensor(X)
    n = torch.tensor([[0.2, 0.6, 0, 1], [1, 1 / 3, 0, 1]])
    signed = n * tau.sign()
    beta = torch.stack([(2 * n[t] ** 2).exp() * (signed[t] * signed).tanh().sum(0) for t in (0, 1)])
    near(beta[0], torch.tensor([0.2571, 0.3037, 0.0, 11.2549]))
    assert beta[1, 1] < 0
    w = beta.clamp(min=0) / beta.amax(1, keepdim=True)
    near(pcb(vectors(*X), keep=1.0, clip=0.0, scale=1.0)["w"], (w * tau).sum(0) / w.sum(0).clamp(min=1e-12))


def test_entries_in_conflict_never_get_a_weight() -> None:
    merged = pcb(vectors([1.0, -4.0, 0.1], [1.0, 4.0, 0.1], [1.0, 4.0, -0.1]), keep=1.0, clip=0.0, scale=1.0)
    assert merged["w"][1] == 4


def test_quantiles_are_of_the_whole_model_and_clip_both_ends() -> None:
    rows = [[float(x) for x in range(1, 11)]]
    clipped = pcb(vectors(*rows), keep=1.0, clip=0.1, scale=1.0)["w"]
    assert clipped.tolist()[-1] == 9  # sorted[int(10 * 0.9 - 1)]
    assert clipped.tolist()[:2] == [0, 0]  # sorted[int(10 * 0.1)] = 2 is the smallest, and has no weight


def test_constant_vectors_divide_by_nothing() -> None:
    assert pcb(vectors([1.0, 1.0], [2.0, 2.0]))["w"].tolist() == [0, 0]


@pytest.mark.parametrize("factor", [0.125, 1024.0])
def test_no_scale_changes_which_entries_stay(factor: float) -> None:
    rows = [(uniform((50,), t) - 0.5) for t in range(3)]
    first, again = (pcb(vectors(*[(r * f).tolist() for r in rows]))["w"] for f in (1.0, factor))
    assert torch.equal(first * factor, again)
