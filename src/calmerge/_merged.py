"""More than one model out of one merge: a shared vector, and a small patch for each task."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._folder import Journal
from calmerge._run import Run
from calmerge._weights import Spec, Weights
from calmerge._writer import settle_kept, write_json, write_side_by_side

if TYPE_CHECKING:
    import torch

    from calmerge.tasks.base import Model

_KINDS = {
    "affine": "pieces.head_patch:AffinePatch",
    "factors": "pieces.factor_patch:FactorPatch",
    "mask": "pieces.patch:MaskPatch",
    "surgery": "pieces.head_patch:SurgeryPatch",
}
"""Where the patches that can be read back are defined, by kind: "module:class"."""
_ROUTERS = {"neural": "pieces.router:NeuralRouter", "subspace": "pieces.subspace:SubspaceRouter"}
"""The same of routers."""


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
    """Which tasks an input belongs to, for those who do not know.

    A class of routers stands in `_ROUTERS` under its `kind`, and `restore` makes it again of what `stored` gave.
    """

    @property
    def kind(self) -> str:
        """Its name in the table of routers."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its outputs, in order; they are those of the patches, which may stand in any order."""

    @property
    def stored(self) -> Weights:
        """The tensors that a file of it holds."""

    def over(self, model: "Model", base: Weights, merged: "Merged", *, device: "torch.device" = ...) -> "Model":
        """The model at work, its weights on `device`: it routes its inputs itself, whatever weights it is given."""

    @classmethod
    def restore(cls, stored: Weights, tasks: tuple[str, ...]) -> "Router":
        """The router whose `stored` was written and is read again."""


@dataclass(frozen=True)
class Merged:
    """What a method gives that keeps one small thing for each task; everything in it is lazy.

    Attributes:
        shared: the vector that all tasks share, a delta over the base.
        patches: by task, what makes the task's own vector of it.
        router: finds the task of an input, where there is one.

    Raises:
        UsageError: the router is one of other tasks.

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

    def __post_init__(self) -> None:
        if self.router is not None and set(self.router.tasks) != set(self.patches):
            raise UsageError(
                f"the router knows the tasks {', '.join(self.router.tasks)}; there are patches of "
                f"{', '.join(self.patches)}. Both must be of the same tasks."
            )

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
        """Bytes of the shared vector, of all patches and of the router, as they are stored."""
        routing = 0 if self.router is None else self.router.stored.nbytes
        return self.shared.nbytes + sum(patch.stored.nbytes for patch in self.patches.values()) + routing

    @property
    def heads(self) -> Literal["frozen", "realigned"]:
        """Whether every task keeps its expert's head as it is, or some patch stands between features and scores."""
        return "realigned" if any(hasattr(patch, "scores") for patch in self.patches.values()) else "frozen"


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
        **({"router": merged.router.stored.nbytes} if merged.router is not None else {}),
        "all": base.nbytes + merged.nbytes,
        "experts": own + rest,
    }


def written_together(merged: Merged) -> list[dict[str, Weights]]:
    """What is written side by side, by folder: the shared vector alone, then patches of one layout, then the router."""
    groups: dict[object, dict[str, Weights]] = {}
    for task, patch in merged.patches.items():
        stored = patch.stored
        groups.setdefault(tuple(stored.specs.items()), {})[f"patches/{task}"] = stored
    routing = [] if merged.router is None else [{"router": merged.router.stored}]
    return [{"shared": merged.shared}, *groups.values(), *routing]


def write_merged(
    folder: Path, merged: Merged, *, shard: str | int = "5GB", chunk: int = 2**18,
    threads: int | None = None, run: Run | None = None, journal: Journal | None = None,
) -> dict[str, str]:  # fmt: skip
    """The BLAKE3 of the files written: `shared/` with the shared vector in float32, `patches/<task>/`, `router/`."""
    hashes: dict[str, str] = {}
    groups = written_together(merged)
    every = [weights for group in groups for weights in group.values()]
    settle_kept(every, threads or os.cpu_count() or 1, run or Run(), journal)
    for group in groups:
        for name in group:
            (folder / name).mkdir(parents=True, exist_ok=True)
        # an eighth of a chunk: a byte of a mask stands for eight entries
        size = chunk if "shared" in group else max(1, chunk // 8)
        places = {folder / name: weights for name, weights in group.items()}
        written = write_side_by_side(places, shard=shard, chunk=size, threads=threads, run=run, journal=journal)
        hashes |= {f"{p.relative_to(folder)}/{file}": sha for p, of in written.items() for file, sha in of.items()}
    for task, patch in merged.patches.items():
        write_json(folder / "patches" / task / "patch.json", {"kind": patch.kind})
    if merged.router is not None:
        write_json(folder / "router" / "router.json", {"kind": merged.router.kind, "tasks": list(merged.router.tasks)})
    return hashes


def open_merged(folder: str | Path) -> Merged:
    """The shared vector, patches and router of a folder that `save` wrote of a `Merged`, from headers alone.

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
        patches[place.name] = _class_of(kind, _KINDS, "patch", place).restore(open_checkpoint(place), shared)
    return Merged(shared, patches, _open_router(folder / "router"))


def _open_router(place: Path) -> Router | None:
    if not place.is_dir():
        return None
    said = json.loads((place / "router.json").read_text())
    found: Router = _class_of(said["kind"], _ROUTERS, "router", place).restore(
        open_checkpoint(place), tuple(said["tasks"])
    )
    return found


def _class_of(kind: str, table: Mapping[str, str], what: str, place: Path) -> Any:
    if kind not in table:
        raise CheckpointError(f"'{place}': unknown kind of {what} '{kind}'. {did_you_mean(kind, table)}")
    module, _, name = table[kind].partition(":")
    return getattr(import_module(f"calmerge.{module}"), name)


def is_patched(folder: str | Path) -> bool:
    """Whether a merged folder holds a model for each task, as a shared vector and patches."""
    return (Path(folder) / "shared").is_dir() and (Path(folder) / "patches").is_dir()
