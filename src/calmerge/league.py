"""The league: every method on one suite, under one protocol, in one report."""

import gc
import hashlib
import json
import logging
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from calmerge._entries import Entry, entries_of, filled
from calmerge._errors import CalmergeError
from calmerge._hash import hash_of, joined
from calmerge._memory import peak_memory
from calmerge._merged import Merged, storage
from calmerge._pipe import Surroundings, build_pipe, data_used, read_pipe, walk
from calmerge._run import Run
from calmerge._save import hashes, versions
from calmerge._signature import options_of
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights, add
from calmerge._yaml import Data, from_data
from calmerge.fitting.fit import empty, write
from calmerge.inspect import inspect_task_vectors
from calmerge.methods import METHODS
from calmerge.report import results
from calmerge.report.league import mean, normalised
from calmerge.report.results import Protocol, Report, Row, Score, TaskInfo, Versions
from calmerge.report.tables import csv_table
from calmerge.report.traces import Trace
from calmerge.suites.suite import Suite
from calmerge.tasks.base import Split, Tasks
from calmerge.tasks.serving import serving


def run_bench(
    suite: Suite,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    transductive: bool = False,
    quick: bool = False,
    tasks: Sequence[str] | None = None,
    command: str | None = None,
    run: Run | None = None,
    out: Path,
) -> Report:
    """The report of a suite: base, experts, and every method, each with every seed if it draws anything.

    Methods adapt on the tasks' unlabelled pools (or, where the suite says so, on the test inputs), numbers are chosen
    on validation splits, and the test split is read once for each finished model, after its last update.
    Finished rows are kept in `out/rows` and used again as long as what they were made of stays the same, so that an
    interrupted bench goes on, and a method that is added, or given other options, runs alone. One that fails keeps its
    reason in the report, stops nothing, and is tried again next time.

    Args:
        suite: what is not there of its base, experts and data is made (see `calmerge.suites.prepare`).
        methods: names of `ENTRIES` or of methods; all entries when None.
        seeds: for methods that draw.
        transductive: let every method that learns run a second time on the test inputs, without their labels, in a
            block of its own.
        quick: the first four tasks, the first seed, a quarter of the updates; a look, not a result.
        tasks: only these tasks.
        command: what the user typed, for the report.
        run: progress.
        out: folder for rows, resumable state, `report.json`, `report.csv` and `report.html`.

    Raises:
        UsageError: an unknown method.
        CheckpointError, DataError: the suite cannot be made or opened.
        OutputError: nothing can be written into `out`.
    """
    from calmerge.report.html import write_html
    from calmerge.suites.prepare import prepare
    from calmerge.tasks.hf import open_suite

    run = run or Run()
    entries = entries_of(methods)
    names = list(tasks or suite.tasks)[: 4 if quick else None]
    seeds = list(seeds)[: 1 if quick else None]
    results.check_writable(out)
    prepare(suite, names, run=run)
    tvs, opened = open_suite(suite, names=names, run=run)
    league = _League(suite, tvs, opened, out, run, quick)
    skeleton = _report(suite, tvs, opened, seeds, quick, command)
    rows = league.references()
    report = skeleton.model_copy(update={"rows": rows})
    again = transductive and not suite.transductive
    for entry in [*entries, *(_on_test(entry) for entry in entries if again and entry.learns)]:
        for seed in seeds if entry.draws else [None]:
            rows.append(league.row(entry, seed, experts=rows[1].scores))
            report = skeleton.model_copy(update={"rows": list(rows)})
            results.dump(report, out / "report.json")
    results.dump(report, out / "report.json")
    results.write_text(out / "report.csv", csv_table(report))
    write_html(report, out / "report.html")
    return report


def merge_pipe(data: Data, *, tasks: Tasks | None = None, run: Run | None = None, seed: int | None = None) -> Any:
    """The merge that a recipe's `merge:` describes, for use in Python.

    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
    >>> merge_pipe([{"task_arithmetic": {"scale": 0.5}}])(tvs)["w"]
    tensor([0.5000])
    """
    steps = read_pipe(from_data(data, "merge"), [])
    return build_pipe(steps, METHODS, Surroundings(tasks, run, seed))


def _on_test(entry: Entry) -> Entry:
    return replace(entry, label=f"{entry.label} (transductive)", on_test=True)


class _League:
    def __init__(self, suite: Suite, tvs: TaskVectors, tasks: Tasks, out: Path, run: Run, quick: bool) -> None:
        self.suite, self.tvs, self.tasks, self.out, self.run, self.quick = suite, tvs, tasks, out, run, quick
        self._theta = empty(tvs, tasks.device)

    def references(self) -> list[Row]:
        """The base under the experts' heads, and each expert on its own task."""

        def base() -> dict[str, Score]:
            return self.tasks.evaluate({n: self.tvs.base.read(n).float() for n in self.tvs})

        def experts() -> dict[str, Score]:
            logits = ((t, self.tasks.logits(self.tvs.expert(t), t, "test")) for t in self.tvs.tasks)
            return {t: self.tasks.score(scores, t, "test") for t, scores in logits}

        size = self.tvs.base.nbytes
        sizes = {"base": size, "experts": size * len(self.tvs.tasks)}
        rows = []
        for method, label, score in (("base", "Base", base), ("experts", "Experts", experts)):
            file = self._file(label, None, [method])
            row = _kept(file) or _keep(Row(method=method, label=label, scores=score()), file)
            rows.append(row.model_copy(update={"bytes_out": sizes[method], "per_task": method == "experts"}))
        return rows

    def row(self, entry: Entry, seed: int | None, *, experts: Mapping[str, Score]) -> Row:
        """One finished line, from the folder of rows where it is there already; a failed method keeps its reason."""
        pipe = filled(entry.merge, self.suite.methods, quick=self.quick)
        transductive = entry.learns and (self.suite.transductive or entry.on_test)
        split: results.Split = "transductive" if transductive else "inductive" if entry.learns else "none"
        file = self._file(entry.label, seed, [pipe, entry.tune, split, _defaults(pipe)])
        kept = _kept(file)
        if kept:
            return kept
        row = Row(
            method=entry.name,
            label=entry.label,
            options=_options(pipe),
            seed=seed,
            data="validation labels" if entry.tune else data_used(read_pipe(from_data(pipe, entry.label), []), METHODS),
            split=split,
            per_task=entry.per_task,
        )
        state = self.out / "state" / file.stem
        try:
            chosen = self._tuned(entry, pipe, experts)
            found = self._measured(chosen, seed, Run(state, self.run.progress), on_test=entry.on_test)
        except Exception as e:  # one that fails must not take the others' work with it
            logging.getLogger("calmerge").info("%s failed", entry.label, exc_info=True)
            why = str(e) if isinstance(e, CalmergeError) else f"{type(e).__name__}: {e}"
            return row.model_copy(update={"status": "failed", "error": why})
        row = _keep(row.model_copy(update={"options": _options(chosen), **found}), file)
        shutil.rmtree(state, ignore_errors=True)
        return row

    def _measured(self, pipe: Sequence[Data], seed: int | None, run: Run, *, on_test: bool) -> dict[str, Any]:
        """What a row says of one merge: scores, costs, and the curves of its fit."""
        tasks = _adapting_on_test(self.tasks) if on_test else self.tasks
        gc.collect()
        started = time.perf_counter()
        with peak_memory() as peak:
            delta: Weights | Merged = merge_pipe(list(pipe), tasks=tasks, run=run, seed=seed)(self.tvs)
        seconds, most = time.perf_counter() - started + sum(run.earlier), [peak.bytes]
        scores: dict[str, Score] = {}
        if isinstance(delta, Merged) and (delta.router is not None or delta.heads == "realigned"):
            logits = serving(delta, self.tvs.base.only_names(self.tvs.specs), self.tasks)
            scores = {t: self.tasks.score(logits(t, "test"), t, "test") for t in self.tasks}
            each: dict[str | None, Weights] = {}
        else:
            each = {t: delta.for_task(t) for t in self.tasks} if isinstance(delta, Merged) else {None: delta}
        for task, vector in each.items():
            started = time.perf_counter()
            with peak_memory() as peak:
                write(self._theta, self.tvs.base, vector)
            seconds, most = seconds + time.perf_counter() - started, [*most, peak.bytes]
            scores |= self._scores([task] if task else list(self.tasks))
        if isinstance(delta, Merged):
            size = storage(delta, self.tvs.base, self.tvs.experts)["all"]
        else:
            size = add(self.tvs.base, delta).nbytes
        trace: Trace | None = next(iter(run.trace.values()), None)
        return {
            "scores": scores,
            "seconds": seconds,
            "peak_bytes": max((found for found in most if found is not None), default=None),
            "numbers_trained": sum(run.trained) or None,
            "bytes_out": size,
            "heads": delta.heads if isinstance(delta, Merged) else "frozen",
            "trace": trace,
        }

    def _scores(self, names: Sequence[str], split: Split = "test") -> dict[str, Score]:
        """Scores of the weights held now, for some tasks."""
        theta = {n: w.detach() for n, w in self._theta.items()}
        with self.run.progress.track("evaluating", len(names), "task") as bar:
            scores = {}
            for name in names:
                scores[name] = self.tasks.score(self.tasks.logits(theta, name, split), name, split)
                bar.advance(1, task=name)
        return scores

    def _tuned(self, entry: Entry, pipe: Sequence[Data], experts: Mapping[str, Score]) -> list[Data]:
        """The pipe with the best value on validation, ties to the first."""
        if not entry.tune:
            return list(pipe)
        name, values = entry.tune
        reference = {t: s.accuracy for t, s in experts.items()}
        best, found = -1.0, list(pipe)
        with self.run.progress.track(f"choosing {name}", len(values), "value") as bar:
            for value in values:
                tried = _with(pipe, name, value)
                write(self._theta, self.tvs.base, merge_pipe(tried, tasks=self.tasks)(self.tvs))
                scores = self._scores(list(self.tasks), "validation")
                level = mean(normalised({t: s.accuracy for t, s in scores.items()}, reference))
                if level > best:
                    best, found = level, tried
                bar.advance(1)
        return found

    def _file(self, label: str, seed: int | None, made_of: Sequence[Any]) -> Path:
        """Where a row is kept: named by a hash of all that decides it, and of nothing else."""
        suite = [self.suite.data["version"], self.suite.data.get("model"), list(self.tasks), self.tvs.fingerprint]
        content = json.dumps([seed, *made_of, *suite], default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
        words = re.sub("[^a-z0-9+]+", "-", label.lower()).strip("-")
        return self.out / "rows" / f"{'-'.join([words, *([str(seed)] if seed is not None else []), digest])}.json"


def _kept(file: Path) -> Row | None:
    return Row.model_validate_json(file.read_text()) if file.is_file() else None


def _keep(row: Row, file: Path) -> Row:
    results.write_text(file, row.model_dump_json())
    return row


def _options(pipe: Sequence[Data]) -> dict[str, Any]:
    """A row's options: those of its method, or by method where it is a pipe."""
    steps = {name: options for step in pipe if isinstance(step, dict) for name, options in step.items()}
    (options, *more) = steps.values()
    return dict(steps if more or not isinstance(options, dict) else options)


def _defaults(pipe: Sequence[Data]) -> list[tuple[str, str, str]]:
    """The options that the functions bring themselves: a row is made anew where one of them changes."""
    steps = walk(read_pipe(from_data(list(pipe), "merge"), []), METHODS)
    return [
        (step.name, name, getattr(option.default, "__name__", None) or str(option.default))
        for step in steps
        for name, option in options_of(METHODS[step.name]).items()
        if name not in step.options and not option.required
    ]


def _with(pipe: Sequence[Data], name: str, value: float) -> list[Data]:
    """The pipe with one option of its first step set."""
    (method, options), *_ = pipe[0].items()  # type: ignore[union-attr]
    return [{method: {**options, name: value}}, *pipe[1:]]  # type: ignore[dict-item]


def _adapting_on_test(tasks: Tasks) -> Tasks:
    """The tasks with the test inputs as pools."""
    found = {name: replace(task, pool=tasks.split(name, "test"), transductive=True) for name, task in tasks.items()}
    return Tasks(tasks.model, found, batch=tasks.batch, device=tasks.device, autocast=tasks.autocast)


def _report(
    suite: Suite,
    tvs: TaskVectors,
    tasks: Tasks,
    seeds: Sequence[int],
    quick: bool,
    command: str | None,
) -> Report:
    notes = ["Seeds decide which examples are drawn; the experts are the same for all."]
    if quick:
        notes.append("A quick look: fewer tasks, one seed, a quarter of the updates.")
    notes += suite.notes
    return Report(
        title=suite.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=Versions(**_versions()),
        recipe=dict(suite.data),
        suite=results.Suite(
            name=suite.name,
            version=suite.version,
            blake3=hash_of(suite.file),
            title=suite.title,
            model=suite.model.kind,
        ),
        inputs=_inputs(suite, tvs),
        seeds=list(seeds),
        protocol=Protocol(
            split="transductive" if suite.transductive else "inductive",
            heads="frozen",
            adapted_on="the test inputs, without labels"
            if suite.transductive
            else "a pool apart from the test split, without labels",
            selection="the suite's options; tuned ones by validation labels; the last update",
            notes=notes,
        ),
        tasks=[_info(suite, tasks, name) for name in tasks],
        analysis=inspect_task_vectors(tvs).analysis(),
    )


def _info(suite: Suite, tasks: Tasks, name: str) -> TaskInfo:
    task = tasks[name]
    return TaskInfo(
        name=name,
        title=suite.tasks[name].title,
        classes=list(task.classes),
        n_pool=len(tasks.split(name, "pool")),
        n_validation=len(tasks.split(name, "validation")) if task.validation is not None else None,
        n_test=len(tasks.split(name, "test")),
    )


def _inputs(suite: Suite, tvs: TaskVectors) -> dict[str, results.Input]:
    sources = {"base": (suite.base, tvs.base)} | {t: (suite.tasks[t].expert, w) for t, w in tvs.experts.items()}
    found = {}
    for name, (label, weights) in sources.items():
        found[name] = results.Input(
            label=str(label),
            blake3=joined(hashes(weights)),
            licence=suite.tasks[name].licence if name in suite.tasks else None,
        )
    return found


def _versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    return {
        "calmerge": version("calmerge"),
        "torch": torch.__version__,
        "python": versions()["python"],
        "platform": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "transformers": transformers,
    }
