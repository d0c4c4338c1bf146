"""The table of methods: everything in it is found out, nothing is missing."""

import pytest

from calmerge._catalogue import GROUPS, catalogue
from calmerge.methods import METHODS

ENTRIES = {entry.method: entry for entry in catalogue()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_row_whole(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.group in GROUPS
    assert entry.summary
    assert entry.paper[-4:].isdigit(), "its Source names no venue and year"
    assert (entry.memory, entry.passes) == ("E", None) if entry.data == "unlabelled" else entry.passes


@pytest.mark.parametrize(
    ("name", "group", "passes", "memory"),
    [
        ("average", "one model of all experts", 1, "A"),
        ("ties", "one model of all experts", 2, "C"),
        ("tsv_m", "one model of all experts", 1, "B"),
        ("trim", "task vectors, before a merge", 2, "C"),
        ("lines", "after a merge", 2, "C"),
        ("adamerging", "one model, learned from data", None, "E"),
        ("mergekit_linear", "mergekit's rules", 1, "A"),
    ],
)
def test_rows_that_are_known(name: str, group: str, passes: int | None, memory: str) -> None:
    entry = ENTRIES[name]
    assert (entry.group, entry.passes, entry.memory) == (group, passes, memory)
