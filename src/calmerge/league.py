"""The league: every method on one suite, under one protocol, in one report."""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from calmerge._checkpoint import sha256
from calmerge._errors import CalmergeError, UsageError, did_you_mean
from calmerge._memory import peak_memory
from calmerge._merged import Merged
from calmerge._pipe import Surroundings, build_pipe, needs_tasks, read_pipe
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
from calmerge.report.traces import Trace
from calmerge.suites.suite import Suite
from calmerge.tasks.base import Tasks

GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))


@dataclass(frozen=True)
class Entry:
    """One line of the league: a method with its options.

    Args:
        method: its name in `METHODS`.
        label: what tables call it.
        tune: an option and the values to choose from by mean normalised accuracy on the validation splits.
    """

    method: str
    label: str
    tune: tuple[str, Sequence[float]] | None = None
    options: Mapping[str, Data] = field(default_factory=dict)


ENTRIES: Mapping[str, Entry] = {
    "average": Entry("average", "Averaging"),
    "task_arithmetic": Entry("task_arithmetic", "Task Arithmetic 0.3", options={"scale": 0.3}),
    "task_arithmetic_tuned": Entry("task_arithmetic", "Task Arithmetic, tuned", tune=("scale", GRID)),
    "ties": Entry("ties", "TIES"),
    "dare": Entry("dare", "DARE"),
    "adamerging": Entry("adamerging", "AdaMerging"),
    "adamerging_pp": Entry("adamerging_pp", "AdaMerging++"),
    "calm": Entry("calm", "CALM"),
}
"""The methods that `run_bench` compares when none are named, in the order of the table."""


def run_bench(
    suite: Suite,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    quick: bool = False,
    tasks: Sequence[str] | None = None,
    command: str | None = None,
    run: Run | None = None,
    out: Path,
) -> Report:
    """The report of a suite: base, experts, and every method, each with every seed if it draws anything.

    Methods adapt on the tasks' unlabelled pools (or, where the suite says so, on the test inputs), numbers are chosen
    on validation splits, and the test split is read once for each finished model, after its last update.
    Finished rows are kept in `out/rows` and used again, so that an interrupted bench goes on.

    Args:
        suite: its base, experts and data must be there (see `calmerge.suites.prepare`).
        methods: names of `ENTRIES` or of methods; all entries when None.
        seeds: for methods that draw.
        quick: the first four tasks, the first seed, a quarter of the updates; a look, not a result.
        tasks: only these tasks.
        command: what the user typed, for the report.
        run: progress.
        out: folder for rows, resumable state, `report.json` and `report.html`.

    Raises:
        UsageError: an unknown method.
        CheckpointError, DataError: the suite cannot be opened.
    """
    from calmerge.report.html import write_html
    from calmerge.tasks.hf import open_suite

    run = run or Run()
    entries = _entries(methods)
    names = list(tasks or suite.tasks)[: 4 if quick else None]
    seeds = list(seeds)[: 1 if quick else None]
    tvs, opened = open_suite(suite, names=names, run=run)
    league = _League(suite, tvs, opened, out, run, quick)
    skeleton = _report(suite, tvs, opened, seeds, quick, command)
    rows = league.references()
    for entry in entries:
        for seed in seeds if "seed" in options_of(METHODS[entry.method]) else [None]:
            rows.append(league.row(entry, seed, experts=rows[1].scores))
            results.dump(skeleton.model_copy(update={"rows": list(rows)}), out / "report.json")
    report = skeleton.model_copy(update={"rows": rows})
    results.dump(report, out / "report.json")
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

        rows = []
        for method, label, score in (("base", "Base", base), ("experts", "Experts", experts)):
            kept = self._kept(method, None, {})
            rows.append(kept or self._keep(Row(method=method, label=label, scores=score()), None, {}))
        return rows

    def row(self, entry: Entry, seed: int | None, *, experts: Mapping[str, Score]) -> Row:
        """One finished line, from the folder of rows where it is there already; a failed method keeps its reason."""
        options = {**self._options(entry), **entry.options}
        kept = self._kept(entry.label, seed, options)
        if kept:
            return kept
        try:
            chosen, note = self._tuned(entry, options, experts)
            row = self._measured(entry, chosen, seed, note)
        except CalmergeError as e:
            row = Row(
                method=entry.method, label=entry.label, options=dict(options), seed=seed, status="failed", error=str(e)
            )
            return row
        kept = self._keep(row, seed, options)
        shutil.rmtree(self._state(entry.label, seed, row.options), ignore_errors=True)
        return kept

    def _measured(self, entry: Entry, options: Mapping[str, Data], seed: int | None, data: results.DataUse) -> Row:
        run = Run(self._state(entry.label, seed, options), self.run.progress)
        started = time.perf_counter()
        with peak_memory() as peak:
            delta = self._merge(entry.method, options, seed, run)
            write(self._theta, self.tvs.base, delta)
        seconds = time.perf_counter() - started
        fitted = needs_tasks(METHODS[entry.method])
        trace = next(iter(run.trace.values()), None)
        return Row(
            method=entry.method,
            label=entry.label,
            options=dict(options),
            seed=seed,
            scores=self.tasks.evaluate({n: w.detach() for n, w in self._theta.items()}, run=self.run),
            seconds=seconds,
            peak_bytes=peak.bytes,
            data="unlabelled pool" if fitted else data,
            split=("transductive" if self.suite.transductive else "inductive") if fitted else "none",
            numbers_trained=_numbers(trace),
            bytes_out=add(self.tvs.base, delta).nbytes,
            trace=trace,
        )

    def _tuned(
        self, entry: Entry, options: Mapping[str, Data], experts: Mapping[str, Score]
    ) -> tuple[dict[str, Data], results.DataUse]:
        """The options with the best value on validation, ties to the first."""
        if not entry.tune:
            return dict(options), "none"
        name, values = entry.tune
        reference = {t: s.accuracy for t, s in experts.items()}
        best, found = -1.0, values[0]
        with self.run.progress.track(f"choosing {name}", len(values), "value") as bar:
            for value in values:
                write(self._theta, self.tvs.base, self._merge(entry.method, {**options, name: value}, None, Run()))
                scores = self.tasks.evaluate({n: w.detach() for n, w in self._theta.items()}, "validation")
                level = mean(normalised({t: s.accuracy for t, s in scores.items()}, reference))
                if level > best:
                    best, found = level, value
                bar.advance(1)
        return {**options, name: found}, "validation labels"

    def _merge(self, method: str, options: Mapping[str, Data], seed: int | None, run: Run) -> Weights:
        pipe = merge_pipe([{method: dict(options)}], tasks=self.tasks, run=run, seed=seed)
        delta: Weights | Merged = pipe(self.tvs)
        if isinstance(delta, Merged):
            raise UsageError(f"{method} gives a model for each task; merge with it, and score the folder with eval.")
        return delta

    def _options(self, entry: Entry) -> dict[str, Data]:
        options = dict(self.suite.methods.get(entry.method, {}))
        if self.quick and "steps" in options_of(METHODS[entry.method]):
            steps = options.get("steps", options_of(METHODS[entry.method])["steps"].default)
            options["steps"] = max(1, int(steps) // 4)  # type: ignore[arg-type]
        return options

    def _key(self, label: str, seed: int | None, options: Mapping[str, Data]) -> str:
        content = json.dumps(
            [label, seed, dict(options), self.suite.data["version"], list(self.tasks), self.tvs.fingerprint]
        )
        digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
        return "-".join(
            [label.lower().replace(" ", "-").replace(",", ""), *([str(seed)] if seed is not None else []), digest]
        )

    def _state(self, label: str, seed: int | None, options: Mapping[str, Data]) -> Path:
        """Where a method keeps what it needs to go on after an interruption; gone when its row is finished."""
        return self.out / "state" / self._key(label, seed, options)

    def _kept(self, label: str, seed: int | None, options: Mapping[str, Data]) -> Row | None:
        file = self.out / "rows" / f"{self._key(label, seed, options)}.json"
        return Row.model_validate_json(file.read_text()) if file.is_file() else None

    def _keep(self, row: Row, seed: int | None, options: Mapping[str, Data]) -> Row:
        label = row.label if row.method not in results.REFERENCES else row.method
        results.write_text(self.out / "rows" / f"{self._key(label, seed, options)}.json", row.model_dump_json())
        return row


def _entries(methods: Sequence[str] | None) -> list[Entry]:
    entries = []
    for name in methods or ENTRIES:
        if name not in ENTRIES and name not in METHODS:
            raise UsageError(f"no method is called '{name}'. {did_you_mean(name, [*ENTRIES, *METHODS])}")
        entries.append(ENTRIES.get(name, Entry(name, name)))
    return entries


def _numbers(trace: Trace | None) -> int | None:
    if trace is None:
        return None
    if trace.kind == "calm":
        return sum(stage.entries for stage in trace.stages)
    return sum(map(len, trace.coefficients.values)) if trace.coefficients else None


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
    return Report(
        title=suite.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=Versions(**_versions()),
        recipe=dict(suite.data),
        suite=results.Suite(
            name=suite.name, version=suite.version, sha256=sha256(suite.file), title=suite.title, model=suite.model.kind
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
        digests = hashes(weights)
        joined = hashlib.sha256("".join(f"{k}{v}" for k, v in sorted(digests.items())).encode()).hexdigest()
        found[name] = results.Input(
            label=str(label),
            sha256=next(iter(digests.values())) if len(digests) == 1 else joined,
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
