"""Flags follow from the place of an entry, however a tensor is cut into blocks."""

import torch

from calmerge import StateDict, task_vectors
from calmerge._flags import Flags
from calmerge._watch import Array


def third(name: str, task: int, offset: int, into: Array) -> None:
    """Every third entry, beginning with the task's number."""
    for i in range(len(into)):
        into[i] = (offset + i) % 3 == task


def test_flags_of_some_rows_are_those_of_the_whole() -> None:
    flags = Flags(StateDict({"w": torch.zeros(4, 2)}), third)
    assert flags["w"].tolist() == [[True, False], [False, True], [False, False], [True, False]]
    assert flags.read("w", slice(1, 3)).tolist() == [[False, True], [False, False]]


def test_beside_task_vectors_every_task_has_its_own() -> None:
    tvs = task_vectors({"w": torch.zeros(3)}, {t: {"w": torch.ones(3)} for t in "ab"})
    assert Flags(tvs, third)["w"].tolist() == [[True, False, False], [False, True, False]]


def test_a_number_without_dimensions_has_one() -> None:
    assert Flags(StateDict({"w": torch.tensor(3.0)}), third)["w"].tolist() is True
