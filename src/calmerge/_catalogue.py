"""What `calmerge list` shows: of every method what it needs, how often it reads the inputs, what it holds, its paper.

Nothing of it is written down twice: words come from docstrings, needs from signatures, passes and memory class from a
plan of the method on a model that has headers only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from calmerge._errors import CalmergeError
from calmerge._explain import example_options, parts_of_docstring
from calmerge._merged import Merged
from calmerge._pipe import gives_patches, gives_task_vectors, needs_tasks, takes_merged
from calmerge._plan import plan
from calmerge._save import to_write
from calmerge._task_vectors import TaskVectors, task_vectors
from calmerge._weights import Spec, Weights

GROUPS = (
    "one model of all experts",
    "one model, learned from data",
    "a model for each task",
    "task vectors, before a merge",
    "after a merge",
    "mergekit's rules",
)
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        method: its name in recipes.
        group: one of `GROUPS`.
        data: what it needs beside weights: `unlabelled` inputs, or `none`.
        gives: `a model`, `a model per task`, `task vectors`.
        passes: how often base and experts are read, the writing included; None where the data decide.
        memory: A, B, C, B+C as in a plan; E where parameters are learned.
        paper: venue and year.
        summary: what comes out, in one line.
    """

    method: str
    group: str
    data: str
    gives: str
    passes: int | None
    memory: str
    paper: str
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def catalogue(methods: Mapping[str, Callable[..., Any]] | None = None) -> list[Entry]:
    """All methods, by group and then by name.

    >>> from calmerge.methods.ties import ties
    >>> found = catalogue({"ties": ties})[0]
    >>> found.passes, found.memory, found.paper
    (2, 'C', 'NeurIPS 2023')
    """
    if methods is None:
        from calmerge.methods import METHODS

        methods = METHODS
    entries = [_entry(name, fn) for name, fn in methods.items()]
    return sorted(entries, key=lambda e: (GROUPS.index(e.group), e.method))


@cache
def cost(fn: Callable[..., Any]) -> tuple[int | None, str]:
    """Passes and memory class of a method with its defaults."""
    if needs_tasks(fn):
        return None, "E"
    for tvs in _toys():
        try:
            merged = fn(tvs.of(tvs.tasks[0]), tvs) if takes_merged(fn) else fn(tvs, **example_options(fn))
        except CalmergeError:  # another number of experts, or adapters only
            continue
        if isinstance(merged, TaskVectors):
            merged = merged.reduce(lambda tau, site: tau.sum(0))
        found = plan(*to_write(tvs, merged)[isinstance(merged, Merged) :])  # the base is copied beside patches
        return found.passes, found.kind
    return None, ""


def _entry(name: str, fn: Callable[..., Any]) -> Entry:
    passes, memory = cost(fn)
    words = parts_of_docstring(fn)
    return Entry(
        method=name,
        group=_group(name, fn),
        data="unlabelled" if needs_tasks(fn) else "none",
        gives="task vectors" if gives_task_vectors(fn) else "a model per task" if gives_patches(fn) else "a model",
        passes=passes,
        memory=memory,
        paper=_paper(words["source"]),
        summary=words["summary"],
    )


def _group(name: str, fn: Callable[..., Any]) -> str:
    one, learned, each, before, after, mergekit = GROUPS
    if name.startswith("mergekit_"):
        return mergekit
    if gives_patches(fn):
        return each
    if needs_tasks(fn):
        return learned
    if takes_merged(fn):
        return after
    return before if gives_task_vectors(fn) else one


def _paper(source: str) -> str:
    """Venue and year of the first publication that a "Source:" names, its title left out.

    >>> _paper('Source: Yadav, Raffel, "TIES-Merging 2000: A Title", NeurIPS 2023; owner/code (MIT), arXiv 2020.')
    'NeurIPS 2023'
    """
    plain = re.sub(r'"[^"]*"', "", source.split("Differences:")[0])
    found = re.search(r"\b([A-Z][\w&.-]*|arXiv)(?: [A-Z][\w&.-]*)* ((?:19|20)\d\d)\b", " ".join(plain.split()))
    return found[0] if found else ""


class _Headers(Weights):
    """A model of two layers that cannot be read."""

    def __init__(self) -> None:
        norm, matrix = Spec((4096,), torch.float32), Spec((4096, 4096), torch.float32)
        layers = [f"model.layers.{i}" for i in range(2)]
        self.specs = {f"{layer}.self_attn.q_proj.weight": matrix for layer in layers}
        self.specs |= {f"{layer}.input_layernorm.weight": norm for layer in layers}


@cache
def _toys() -> list[TaskVectors]:
    """Two experts, one, three; named as the examples of docstrings name them."""
    experts = [("cars", "dtd"), ("dtd",), ("cars", "dtd", "food")]
    return [task_vectors(_Headers(), {name: _Headers() for name in names}) for names in experts]
