"""More than one model out of one merge: a shared vector, and a small patch for each task."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._run import Run
from calmerge._weights import Spec, Weights
from calmerge._writer import write_json, write_side_by_side

_KINDS = {"factors": "pieces.factor_patch:FactorPatch", "mask": "pieces.patch:MaskPatch"}
"""Where the patches that can be read back are defined, by kind: "module:class"."""


class Patch(Protocol):
    """What makes one task's vector of the vector that all tasks share.

    A class of patches stands in `_KINDS` under its `kind`, and `restore` makes it again of what `stored` gave.
    """

    @property
    def kind(self) -> str:
        """Its name in the table of patches."""

    @property
    def stored(self) -> Weights:
        """The tensors that a file of it holds, lazy."""

    def apply(self, shared: Weights) -> Weights:
        """The task's vector, lazy: what is added to the base for this task alone."""

    @classmethod
    def restore(cls, stored: Weights, shared: Weights) -> "Patch":
        """The patch whose `stored` was written and is read again."""


class Router(Protocol):
    """Which tasks an input belongs to, for those who do not know."""

    def __call__(self, features: Tensor) -> Tensor:
        """Weights over the tasks, in the order of the patches: [inputs, features] to [inputs, T]."""


@dataclass(frozen=True)
class Merged:
    """What a method gives that keeps one small thing for each task; everything in it is lazy.

    Attributes:
        shared: the vector that all tasks share, a delta over the base.
        patches: by task, what makes the task's own vector of it.
        router: finds the task of an input, where there is one.

    >>> import torch; from calmerge import StateDict, add, tall_masks, task_vectors
    >>> base = {"w": torch.tensor([1.0, 1.0])}
    >>> experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([1.0, 5.0])}}
    >>> merged = tall_masks(task_vectors(base, experts))
    >>> add(StateDict(base), merged.for_task("b"))["w"]
    tensor([1., 5.])
    """

    shared: Weights
    patches: Mapping[str, Patch]
    router: Router | None = None

    def for_task(self, task: str) -> Weights:
        """One task's vector, to be added to the base like any merge.

        Raises:
            UsageError: there is no such task.
        """
        if task not in self.patches:
            raise UsageError(f"no task '{task}'. {did_you_mean(task, self.patches)}")
        return self.patches[task].apply(self.shared)

    @property
    def specs(self) -> dict[str, Spec]:
        """Names, shapes and types of the tensors that any task's vector has."""
        return {n: spec for task in self.patches for n, spec in self.for_task(task).specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the shared vector and of all patches, as they are stored."""
        return self.shared.nbytes + sum(patch.stored.nbytes for patch in self.patches.values())


def storage(merged: Merged, base: Weights, experts: Mapping[str, Weights]) -> dict[str, Any]:
    """What a merged folder costs in bytes, heads aside, beside what the experts cost.

    Args:
        merged: shared vector and patches.
        base: kept in the folder too, since the vectors are added to it.
        experts: by task, each of them counted with the tensors that it has of the base; one which no expert changes
            could be shared, so that the folder is not flattered by it.

    >>> import torch; from calmerge import task_vectors, tall_masks
    >>> tvs = task_vectors({"w": torch.zeros(16)}, {t: {"w": torch.ones(16)} for t in ("a", "b", "c")})
    >>> found = storage(tall_masks(tvs), tvs.base, tvs.experts)
    >>> found["model"], found["shared"], found["patches"], found["all"], found["experts"]
    (64, 64, {'a': 2, 'b': 2, 'c': 2}, 134, 192)
    """
    names = merged.specs
    own = sum(spec.nbytes for w in experts.values() for name, spec in w.specs.items() if name in names)
    rest = sum(spec.nbytes for name, spec in base.specs.items() if name not in names)
    return {
        "model": base.nbytes,
        "shared": merged.shared.nbytes,
        "patches": {task: patch.stored.nbytes for task, patch in merged.patches.items()},
        "all": base.nbytes + merged.nbytes,
        "experts": own + rest,
    }


def written_together(merged: Merged) -> list[dict[str, Weights]]:
    """What is written side by side, by folder: the shared vector alone, then patches of one layout."""
    groups: dict[object, dict[str, Weights]] = {}
    for task, patch in merged.patches.items():
        stored = patch.stored
        groups.setdefault(tuple(stored.specs.items()), {})[f"patches/{task}"] = stored
    return [{"shared": merged.shared}, *groups.values()]


def write_merged(
    folder: Path, merged: Merged, *, shard: str | int = "5GB", chunk: int = 2**18,
    threads: int | None = None, run: Run | None = None,
) -> dict[str, str]:  # fmt: skip
    """The SHA-256 of the files written: `shared/` with the shared vector in float32, and `patches/<task>/`.

    Raises:
        UsageError: there is a router, which has no file format yet.
    """
    if merged.router is not None:
        raise UsageError("a merge with a router cannot be saved yet; save it without one, and name tasks yourself.")
    hashes: dict[str, str] = {}
    for group in written_together(merged):
        for name in group:
            (folder / name).mkdir(parents=True, exist_ok=True)
        # an eighth of a chunk: a byte of a mask stands for eight entries
        size = chunk if "shared" in group else max(1, chunk // 8)
        places = {folder / name: weights for name, weights in group.items()}
        written = write_side_by_side(places, shard=shard, chunk=size, threads=threads, run=run)
        hashes |= {f"{p.relative_to(folder)}/{file}": sha for p, of in written.items() for file, sha in of.items()}
    for task, patch in merged.patches.items():
        write_json(folder / "patches" / task / "patch.json", {"kind": patch.kind})
    return hashes


def open_merged(folder: str | Path) -> Merged:
    """The shared vector and patches of a folder that `save` wrote of a `Merged`, from headers alone.

    Raises:
        CheckpointError: the folder has none, or of a kind that this version does not know.
    """
    folder = Path(folder)
    if not is_patched(folder):
        raise CheckpointError(f"'{folder}' holds one model for all tasks; it has no patches.")
    shared = open_checkpoint(folder / "shared")
    patches = {}
    for place in sorted((folder / "patches").iterdir()):
        kind = json.loads((place / "patch.json").read_text())["kind"]
        if kind not in _KINDS:
            raise CheckpointError(f"'{place}': unknown kind of patch '{kind}'. {did_you_mean(kind, _KINDS)}")
        module, _, name = _KINDS[kind].partition(":")
        made: type[Patch] = getattr(import_module(f"calmerge.{module}"), name)
        patches[place.name] = made.restore(open_checkpoint(place), shared)
    return Merged(shared, patches)


def is_patched(folder: str | Path) -> bool:
    """Whether a merged folder holds a model for each task, as a shared vector and patches."""
    return (Path(folder) / "shared").is_dir() and (Path(folder) / "patches").is_dir()
