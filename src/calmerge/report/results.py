"""The typed content of `report.json`, schema 1, from which tables, page and card are computed."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePath, PureWindowsPath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from calmerge._errors import DataError, OutputError
from calmerge._pipe import DataUse
from calmerge.report.traces import Count, Record, Share, Trace

SCHEMA = 1
Split = Literal["inductive", "transductive", "none"]
Heads = Literal["frozen", "realigned"]
REFERENCES = ("base", "experts")


def path_free(label: str) -> str:
    """`label` without the folders of the machine: paths keep only their last part, hub ids stay.

    >>> path_free("/home/ann/models/cars"), path_free("~/cars/"), path_free("google/vit-base")
    ('cars', 'cars', 'google/vit-base')
    >>> path_free("C:\\\\models\\\\cars"), path_free("./cars"), path_free("../../models/cars")
    ('cars', 'cars', 'cars')
    """
    if PureWindowsPath(label).drive or "\\" in label:
        return PureWindowsPath(label).name
    if label.startswith(("/", "~", ".")):
        return PurePath(label).name
    return label


class Versions(Record):
    """The software that made the numbers."""

    calmerge: str
    torch: str
    python: str
    platform: str
    transformers: str | None = None


class Input(Record):
    """One checkpoint that went in; `label` is a hub id or a folder's name, never a path of the machine.

    >>> Input(label="/home/ann/experts/cars").label
    'cars'
    """

    label: Annotated[str, BeforeValidator(lambda v: path_free(v) if isinstance(v, str) else v)]
    blake3: str | None = None
    revision: str | None = None
    licence: str | None = None


class Suite(Record):
    """The suite file that was run; `model` is its kind of model, such as `sequence-classifier`."""

    name: str
    version: int | str
    blake3: str | None = None
    title: str | None = None
    model: str | None = None


class Protocol(Record):
    """How the numbers came about.

    Args:
        split: `inductive` if no method saw test inputs, `transductive` if one did, `none` without data.
        heads: such as `frozen`: each task keeps its expert's head.
        adapted_on: what fitted methods saw, in words.
        selection: how options were chosen, in words.
        notes: further sentences to print.
    """

    split: Split = "none"
    heads: str = "frozen"
    adapted_on: str = "nothing"
    selection: str = "defaults"
    notes: list[str] = Field(default_factory=list)


class TaskInfo(Record):
    """A task, its classes and the sizes of its splits."""

    name: str
    title: str | None = None
    classes: list[str] = Field(default_factory=list)
    n_pool: Count | None = None
    n_validation: Count | None = None
    n_test: Count | None = None


class Score(Record):
    """Accuracy in [0, 1] on `n` test examples; `predicted` counts the predictions of each class, in order.

    >>> Score(accuracy=0.75, n=4, predicted=[3, 1]).predicted
    [3, 1]
    """

    accuracy: Share
    n: Annotated[int, Field(ge=1)]
    predicted: list[Count] | None = None


class Row(Record):
    """One run of one method with one seed. Rows with the same `label` are summarised together.

    Args:
        method: name in the table of methods (joined by " + " for a pipe), or `base` / `experts` for the references.
        label: what tables print; unique per method and options.
        options: the options given.
        seed: the seed, or None if nothing random is in the method.
        scores: test scores of all tasks of the report, or none if the merge was not evaluated.
        seconds: time of the merge itself, without evaluation.
        peak_bytes: highest memory of the process during the merge.
        data: what the method saw besides weights.
        split: the split on which the method's numbers stand.
        numbers_trained: how many numbers were fitted.
        bytes_out: size of what comes out, heads aside: the model, or with `per_task` all that the models are made of.
        per_task: whether a model for each task comes out, so that one has to know the task of an input.
        heads: `frozen` where each task keeps its expert's head, `realigned` where the merge came with heads of its own.
        status: `ok`, or `failed` with `error` saying why.
        trace: curves of a fitted method.
    """

    method: str
    label: str
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    scores: dict[str, Score] = Field(default_factory=dict)
    seconds: Annotated[float, Field(ge=0)] | None = None
    peak_bytes: Count | None = None
    data: DataUse = "none"
    split: Split = "none"
    numbers_trained: Count | None = None
    bytes_out: Count | None = None
    per_task: bool = False
    heads: Heads = "frozen"
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    trace: Trace | None = None

    @model_validator(mode="after")
    def _failure_has_reason(self) -> Self:
        if (self.status == "failed") != bool(self.error):
            raise ValueError(f"row '{self.label}': status {self.status} and error {self.error!r} contradict each other")
        return self


class LeftOut(Record):
    """A tensor that was not merged, and why: `copied` from the base, or `excluded`."""

    name: str
    action: Literal["copied", "excluded"]
    reason: str


class Analysis(Record):
    """How the task vectors relate: norms, and T x T cosines and shares of entries with opposed signs.

    Matrices follow the order of `tasks`; norms are Euclidean.

    >>> Analysis(tasks=["a", "b"], norms={"a": 1.0, "b": 2.0}, cosines=[[1, 0.1], [0.1, 1]]).cosines[0][1]
    0.1
    """

    tasks: list[str]
    norms: dict[str, float] = Field(default_factory=dict)
    cosines: list[list[float]] = Field(default_factory=list)
    sign_conflicts: list[list[float]] = Field(default_factory=list)
    left_out: list[LeftOut] = Field(default_factory=list)

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.tasks)
        for name, matrix in (("cosines", self.cosines), ("sign_conflicts", self.sign_conflicts)):
            if matrix and (len(matrix) != size or any(len(row) != size for row in matrix)):
                raise ValueError(f"{name} must be {size} x {size}, one row and column per task")
        return self


class Report(Record):
    """A whole run: where it came from, what it measured, how the fits went.

    >>> report = Report(
    ...     title="Two tasks", created="2026-01-31T12:00:00",
    ...     tasks=[TaskInfo(name="cars"), TaskInfo(name="dtd")],
    ...     versions=Versions(calmerge="0.1.0", torch="2.9", python="3.11", platform="Linux"),
    ...     rows=[Row(method="ties", label="TIES", scores={"cars": Score(accuracy=0.5, n=10),
    ...                                                    "dtd": Score(accuracy=0.7, n=10)})],
    ... )
    >>> [row.label for row in report.methods()]
    ['TIES']
    >>> loads(dumps(report)) == report
    True
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    title: str
    created: str
    command: str | None = None
    versions: Versions
    recipe: dict[str, Any] | None = None
    suite: Suite | None = None
    inputs: dict[str, Input] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    protocol: Protocol = Protocol()
    tasks: list[TaskInfo] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)
    analysis: Analysis | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        datetime.fromisoformat(self.created)
        names = [task.name for task in self.tasks]
        twice = [name for name, count in Counter(names).items() if count > 1]
        twice += [f"{k[0]} (seed {k[1]})" for k, c in Counter((r.label, r.seed) for r in self.rows).items() if c > 1]
        if twice:
            raise ValueError(f"found twice: {', '.join(twice)}. Tasks, and rows by label and seed, must be unique.")
        for row in self.rows:
            if row.status == "ok" and row.scores and set(row.scores) != set(names):
                raise ValueError(
                    f"row '{row.label}' has scores for {sorted(row.scores)}, the tasks are {sorted(names)}"
                )
        return self

    def reference(self, method: Literal["base", "experts"]) -> Row | None:
        """The evaluated row of the base (with the experts' heads) or of every task's own expert, if any."""
        return next((r for r in self.rows if r.method == method and r.status == "ok" and r.scores), None)

    def methods(self) -> Iterator[Row]:
        """The rows that are merges, in order: all but the references."""
        return (row for row in self.rows if row.method not in REFERENCES)


def dumps(report: Report) -> str:
    """The JSON text of a report, one top-level field a line; the report is checked once more."""
    checked = Report.model_validate(report.model_dump(by_alias=True))
    fields = json.loads(checked.model_dump_json(by_alias=True))
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def loads(text: str | bytes, *, source: str = "report") -> Report:
    """The report in a JSON text; `source` names it in errors.

    Raises:
        DataError: not JSON, another schema, or fields that are wrong, missing or unknown (all are listed).

    >>> loads('{"schema": 2}', source="report.json")
    Traceback (most recent call last):
    calmerge._errors.DataError: report.json has schema 2; this version of calmerge reads 1. ...
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise DataError(f"{source} is not JSON: {error}.") from None
    found = fields.get("schema") if isinstance(fields, dict) else None
    if found != SCHEMA:
        raise DataError(
            f"{source} has schema {found}; this version of calmerge reads {SCHEMA}."
            " Make the report again, or use the version which wrote it."
        )
    try:
        return Report.model_validate(fields)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc'])) or 'report'}: {e['msg']}" for e in error.errors())
        raise DataError(f"{source} does not fit schema {SCHEMA}: " + "; ".join(wrong)) from None


def load(path: str | Path) -> Report:
    """The report in a file.

    Raises:
        DataError: the file cannot be read, or is not a report of this schema.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return loads(text, source=str(path))


def dump(report: Report, path: str | Path) -> Path:
    """Write a report as JSON, all or nothing; returns the path.

    Raises:
        OutputError: the file cannot be written; whatever was there stays.
    """
    return write_text(path, dumps(report))


def check_writable(folder: Path) -> None:
    """Make a folder for reports, before any work is done that it is to hold.

    Raises:
        OutputError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"nothing can be written into {folder}: {error.strerror}.") from None


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name, then rename: no half-written file ever stands at `path`.

    Raises:
        OutputError: the file cannot be written; whatever was there stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    return path
