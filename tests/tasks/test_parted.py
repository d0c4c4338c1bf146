"""Pools cut in two have no example in common, and all of them together."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from calmerge import DataError
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.module import ModuleModel
from calmerge.tasks.parted import parted


def tasks(n: int) -> Tasks:
    pool = DataLoader(TensorDataset(torch.arange(float(n))[:, None], torch.arange(n)))
    return Tasks(ModuleModel(torch.nn.Linear(1, 1)), {"a": Task(pool)})


def inputs(one: Tasks) -> list[float]:
    pool = one.split("a", "pool")
    return pool.batch(torch.arange(len(pool)))[0].flatten().tolist()


def test_every_example_is_in_one_part() -> None:
    rest, held = parted(tasks(10), 3)
    assert len(inputs(held)) == 3
    assert sorted(inputs(rest) + inputs(held)) == list(range(10))


def test_labels_go_with_their_inputs() -> None:
    pool = parted(tasks(10), 3)[0].split("a", "pool")
    found, labels = pool.batch(torch.tensor([4, 0]))
    assert found.flatten().tolist() == labels.tolist()


def test_at_most_half_is_held_out() -> None:
    rest, held = parted(tasks(5), 100)
    assert (len(inputs(rest)), len(inputs(held))) == (3, 2)


def test_a_seed_decides_which() -> None:
    assert inputs(parted(tasks(10), 3)[1]) == inputs(parted(tasks(10), 3)[1])
    assert inputs(parted(tasks(10), 3)[1]) != inputs(parted(tasks(10), 3, seed=1)[1])


def test_a_part_is_known_by_its_examples() -> None:
    prints = {parted(tasks(10), n, seed=s)[1].split("a", "pool").fingerprint for n, s in [(3, 0), (3, 1), (4, 0)]}
    assert len(prints) == 3


def test_one_example_cannot_be_cut_in_two() -> None:
    with pytest.raises(DataError, match="task 'a' has a pool of one example"):
        parted(tasks(1), 3)
