"""Carrying a recipe out: from its file names to a merged folder."""

import logging
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calmerge._errors import OutputError, UsageError
from calmerge._explain import held_in_memory
from calmerge._folder import forget
from calmerge._hash import joined
from calmerge._inputs import key_of
from calmerge._memory import private_memory
from calmerge._merged import Merged
from calmerge._open import open_recipe
from calmerge._pipe import DataUse, walk
from calmerge._plan import plan
from calmerge._recipe import Recipe
from calmerge._run import Run
from calmerge._save import checkpoints_behind, finished_before, hashes, save, to_write, versions
from calmerge._save_adapter import largest, save_adapter
from calmerge._side_files import config_of
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge._writer import MANIFEST
from calmerge.methods import METHODS
from calmerge.recipe import build

if TYPE_CHECKING:
    from calmerge.report.results import Report
    from calmerge.tasks.base import Tasks


@dataclass(frozen=True)
class Preview:
    """What a recipe is going to do, as far as headers tell.

    Attributes:
        steps: the pipe, one call a step.
        tasks: the experts' names; of a stack or towers, those of the models.
        merged: how many tensors are merged, and `entries` how many numbers they hold.
        skipped: how many tensors are taken from the base, by reason.
        heads: how many tensors each task keeps for itself.
        inputs: bytes of base and experts.
        writes: bytes that come out, heads included.
        files: how many files of weights that makes.
        data: which of the tasks' data it looks at.
        kind: memory class: `A`, `B`, `C`, `B+C` as in `calmerge._plan.Plan`; `E` where weights are learned.
        passes: how often the inputs are read; None where that depends on the data, and so are the next two.
        reads: bytes that these passes read.
        memory: bytes of private memory held at most.
        held: what a method that learns holds, in its own words.
        threads: tensors or chunks worked on at a time.
        out: where it goes.
    """

    steps: list[str]
    tasks: list[str]
    merged: int
    entries: int
    skipped: dict[str, int]
    heads: dict[str, int]
    inputs: int
    writes: int
    files: int
    data: DataUse
    kind: str
    passes: int | None
    reads: int | None
    memory: int | None
    held: str
    threads: int | None
    out: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def open_inputs(recipe: Recipe) -> TaskVectors:
    """The task vectors of a recipe, from headers alone.

    Raises:
        CheckpointError: a checkpoint is missing, cannot be read, or does not fit the others; all together, with lines.
    """
    return open_recipe(recipe)


def preview(recipe: Recipe, tvs: TaskVectors) -> Preview:
    """What `run_recipe` would do with these inputs.

    Raises:
        UsageError: the memory that the recipe allows is too little.
    """
    learns = recipe.needs_tasks()
    delta = tvs.of(tvs.tasks[0]) if learns else build(recipe)(tvs, None, None)
    weights = to_write(tvs, delta, dtype=_dtype(recipe))
    adapter = None
    if recipe.out.adapter is not None:
        adapter = largest(tvs, **_adapter(recipe), dtype=_dtype(recipe) or torch.float32)
    work = plan(*weights, shard=recipe.out.shard or "5GB", max_memory=None if learns else recipe.out.max_memory)
    return Preview(
        steps=[str(step) for step in recipe.merge] or [recipe.outline],
        tasks=list(tvs.tasks) or list(dict.fromkeys(Path(key_of(model)).name for model in recipe.models())),
        merged=len(tvs if tvs.tasks else tvs.base),
        entries=(tvs if tvs.tasks else tvs.base).numel,
        skipped=dict(Counter(tvs.skipped.values())),
        heads={task: len(head) for task, head in tvs.heads.items()},
        inputs=_input_bytes(tvs),
        writes=work.writes + sum(head.nbytes for head in tvs.heads.values()) if adapter is None else adapter,
        files=sum(map(len, work.files)) if adapter is None else 1,
        data=recipe.data_used(),
        kind="E" if learns else work.kind,
        passes=None if learns else work.passes,
        reads=None if learns else work.reads,
        memory=None if learns else (private_memory() or 0) + work.memory,
        held=" ".join(held_in_memory(METHODS[step.name]) for step in walk(recipe.merge, METHODS)).strip(),
        threads=None if learns else work.threads,
        out=str(recipe.out.path) if recipe.out.path else None,
    )


def _input_bytes(tvs: TaskVectors) -> int:
    """Bytes of base and experts; of what is computed, those of the checkpoints behind it."""
    sources: dict[int, Weights] = {}
    for weights in (tvs.base, *tvs.experts.values()):
        behind: list[Weights] = [*checkpoints_behind(weights)]
        sources |= {id(one): one for one in behind or [weights]}
    return sum(one.nbytes for one in sources.values())


def run_recipe(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The manifest of the merged folder that a recipe describes, made and written.

    Beside what `save` writes, the folder holds `report.json` and `report.html`. Fitted methods keep their state beside
    it until they are done, so that a killed run goes on where it was.

    Args:
        recipe: as `load_recipe` gives it.
        out: folder of the result; the recipe's if None.
        resume: go on from what a stopped run of the same merge left beside the folder; see `save`.
        command: what the user typed, for the report.
        run: progress, and another place for the state.

    Raises:
        UsageError: neither the recipe nor `out` says where the result goes.
        CheckpointError, DataError, FitError: the inputs, the data, the fit.
        OutputError: the place is taken (found before any work), or cannot be written.
    """
    path = Path(out) if out is not None else recipe.out.path
    if path is None:
        raise UsageError(f"{recipe.file}: no 'out' in the recipe, and no folder was given.")
    path = path.expanduser().absolute()
    run = run or Run()
    if resume and (finished := _finished(path, recipe)):
        return finished
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputError(f"'{path.name}' is there already; nothing was done. Name a new folder, or delete this one.")
    state = run.folder or path.parent / f".{path.name}.state"
    tvs, tasks = _open(recipe, run)
    inner = replace(run, folder=state)
    started = time.perf_counter()
    delta = build(recipe)(tvs, tasks, inner)
    seconds = time.perf_counter() - started + sum(inner.earlier)
    report = _report(recipe, tvs, delta, inner, command, seconds=seconds)
    if recipe.out.adapter is not None:
        manifest = _as_adapter(recipe, path, tvs, delta, report, run, resume=resume)
    else:
        manifest = save(
            path,
            tvs,
            delta,
            dtype=_dtype(recipe),
            shard=recipe.out.shard or "5GB",
            max_memory=recipe.out.max_memory,
            recipe=recipe.to_dict(),
            resume=resume,
            also=lambda folder: _write_report(
                _with_inputs(report, recipe, tvs), folder, card=path.name, whole=_architecture(tvs, delta)
            ),
            run=run,
        )
    if run.folder is None:
        shutil.rmtree(state, ignore_errors=True)
    return manifest


def _as_adapter(
    recipe: Recipe, path: Path, tvs: TaskVectors, delta: Weights | Merged, report: "Report", run: Run, *, resume: bool
) -> dict[str, Any]:
    if isinstance(delta, Merged):
        raise UsageError(
            f"{recipe.file}: {recipe.merge[-1].name} gives a model for each task, and an adapter is one; "
            "remove out.adapter."
        )
    return save_adapter(
        path,
        tvs,
        delta,
        **_adapter(recipe),
        dtype=_dtype(recipe) or torch.float32,
        recipe=recipe.to_dict(),
        resume=resume,
        also=lambda folder: _write_report(_with_inputs(report, recipe, tvs), folder),
        run=run,
    )


def _adapter(recipe: Recipe) -> dict[str, Any]:
    """Options of the adapter that a recipe asks for."""
    return dict(recipe.out.adapter) if isinstance(recipe.out.adapter, Mapping) else {}


def _dtype(recipe: Recipe) -> torch.dtype | None:
    return getattr(torch, recipe.out.dtype) if recipe.out.dtype else None


def _finished(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The manifest of a folder that an earlier run had finished before it was stopped."""
    if not (path / MANIFEST).is_file():
        return None
    manifest = finished_before(path, open_inputs(recipe), recipe.to_dict())
    if manifest is not None:
        forget(path)
        logging.getLogger("calmerge").info("'%s' was finished before", path.name)
    return manifest


def _open(recipe: Recipe, run: Run) -> "tuple[TaskVectors, Tasks | None]":
    learns = recipe.needs_tasks()
    if recipe.tasks is not None and (learns or recipe.tasks.embedded):
        from calmerge.suites.prepare import prepare

        prepare(recipe.tasks, run=run)
    if not learns:
        return open_inputs(recipe), None
    from calmerge.tasks.hf import open_suite

    assert recipe.tasks is not None  # the check of the recipe saw to it
    return open_suite(recipe.tasks, run=run)


def _report(
    recipe: Recipe, tvs: TaskVectors, delta: Weights | Merged, run: Run, command: str | None, *, seconds: float
) -> "Report":
    from calmerge.report import results

    names = [step.name for step in recipe.merge] or [recipe.outline]
    last = recipe.merge[-1].to_data() if recipe.merge else {}
    options = last[names[-1]] if isinstance(last, dict) and last else {}
    learns = recipe.needs_tasks()
    transductive = recipe.tasks is not None and recipe.tasks.transductive
    row = results.Row(
        method=names[-1],
        label=" > ".join(names),
        options=options if isinstance(options, dict) else {},  # cases stand in the recipe
        seed=recipe.seed,
        seconds=seconds,
        data=recipe.data_used(),
        split=("transductive" if transductive else "inductive") if learns else "none",
        per_task=isinstance(delta, Merged),
        heads=delta.heads if isinstance(delta, Merged) else "frozen",
        trace=next(iter(run.trace.values()), None),
    )
    return results.Report(
        title=f"{', '.join(tvs.tasks)}: merged with {row.label}"
        if tvs.tasks
        else f"{Path(recipe.file).stem}: {row.label}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=results.Versions(**_environment()),
        recipe=recipe.to_dict(),
        seeds=[recipe.seed] if recipe.seed is not None else [],
        protocol=results.Protocol(split=row.split, heads=row.heads),
        tasks=[results.TaskInfo(name=task) for task in tvs.tasks],
        rows=[row],
    )


def _with_inputs(report: "Report", recipe: Recipe, tvs: TaskVectors) -> "Report":
    """The report with the hashes of base and experts, which `save` finds beside its writing."""
    from calmerge.report import results

    places = {task: (key_of(recipe.experts[task]), weights) for task, weights in tvs.experts.items()}
    if recipe.base is not None:
        places = {"base": (key_of(recipe.base), tvs.base)} | places
    if recipe.parts():
        behind = checkpoints_behind(tvs.base)
        ends = Counter(Path(one.label).name for one in behind)
        for one in behind:
            name = Path(one.label).name
            places[name if ends[name] == 1 else one.label] = one.label, one
    inputs = {
        name: results.Input(label=str(label), blake3=joined(hashes(weights)))
        for name, (label, weights) in places.items()
    }
    return report.model_copy(update={"inputs": inputs})


def _write_report(report: "Report", folder: Path, *, card: str | None = None, whole: str | None = None) -> None:
    """The report as data and as a page, and a model card that calls the folder `card` (and `whole` as `model_card`)."""
    from calmerge.report import results
    from calmerge.report.card import model_card
    from calmerge.report.html import write_html

    if card is not None:
        (folder / "README.md").write_text(model_card(report, folder=card, whole=whole))
    results.dump(report, folder / "report.json")
    write_html(report, folder / "report.html")


def _architecture(tvs: TaskVectors, delta: Weights | Merged) -> str | None:
    """The class that loads the merged folder; None where its tasks have heads or patches, or nothing tells."""
    told = config_of(tvs.base).get("architectures")
    apart = isinstance(delta, Merged) or any(map(len, tvs.heads.values()))
    return str(told[0]) if isinstance(told, list) and told and not apart else None


def _environment() -> dict[str, str]:
    found = versions()
    return {
        "calmerge": version("calmerge"),
        "torch": found["torch"],
        "python": found["python"],
        "platform": f"{platform.system()} {platform.machine()}",
    }
