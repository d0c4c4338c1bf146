"""The league as a table: in the terminal (rich), as CSV, as Markdown."""

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calmerge.report.league import Spread, Standing, mean, normalised, split_stamp, standings, worst
from calmerge.report.results import Report

DASH = "\N{EN DASH}"
GAP = 2  # blank columns between two columns in the terminal


@dataclass(frozen=True)
class Column:
    """A column of the league: a heading, the text of a cell, and the number that is compared, if any.

    `best` says whether the highest or lowest number of the methods is to be printed bold.
    """

    title: str
    text: Callable[[Standing], str]
    value: Callable[[Standing], float | None] = lambda line: None
    best: Literal["high", "low"] | None = None


def percent(value: float | None) -> str:
    """A share in per cent with one decimal; a dash for what is not known.

    >>> percent(0.8567), percent(None), percent(float("nan"))
    ('85.7', '–', '–')
    """
    return DASH if value is None or math.isnan(value) else f"{100 * value:.1f}"


def duration(seconds: float | None) -> str:
    """Seconds in at most three digits and a unit.

    >>> duration(0.034), duration(7.25), duration(81.0), duration(754), duration(None)
    ('34 ms', '7.2 s', '81 s', '12.6 min', '–')
    """
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def size(count: int | None) -> str:
    """Bytes in decimal units, as disks count.

    >>> size(734_000_000), size(1_500), size(None)
    ('734 MB', '1.5 kB', '–')
    """
    if count is None:
        return DASH
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            value = count / scale
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{count} B"


def count(value: int | None) -> str:
    """A number of numbers in three digits; a dash where nothing is fitted.

    >>> count(488), count(21_293_568), count(9_940), count(None)
    ('488', '21 M', '9.9 k', '–')
    """
    if value is None:
        return DASH
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= scale:
            return f"{value / scale:.0f} {unit}" if value >= 10 * scale else f"{value / scale:.1f} {unit}"
    return str(value)


def task_columns(report: Report) -> list[Column]:
    """One column per task: accuracy in per cent, averaged over seeds."""

    def column(task: str) -> Column:
        def value(line: Standing) -> float | None:
            return line.tasks[task].mean if line.tasks else None

        return Column(task, lambda line: percent(value(line)), value, "high")

    return [column(task.name) for task in report.tasks]


def _mean(spread: Spread | None) -> float | None:
    return spread.mean if spread else None


MEAN = Column("mean", lambda line: str(line.mean) if line.mean else DASH, lambda line: _mean(line.mean), "high")
NORMALISED = Column(
    "normalised",
    lambda line: str(line.normalised_mean) if line.normalised_mean else DASH,
    lambda line: _mean(line.normalised_mean),
    "high",
)
WORST = Column(
    "worst task",
    lambda line: f"{percent(line.worst[1])} {line.worst[0]}" if line.worst and not line.is_reference else DASH,
    lambda line: line.worst[1] if line.worst else None,
    "high",
)
COSTS = [
    Column("time", lambda line: duration(line.seconds), lambda line: line.seconds),
    Column("peak", lambda line: size(line.peak_bytes), lambda line: line.peak_bytes),
    Column("trained", lambda line: count(line.numbers_trained), lambda line: line.numbers_trained),
    Column("size", lambda line: size(line.bytes_out), lambda line: line.bytes_out),
]
DATA = Column("data", lambda line: data_used(line))


def data_used(line: Standing) -> str:
    """What a method saw besides the weights."""
    if line.is_reference:
        return DASH
    data = {"none": "none", "unlabelled pool": "pool", "validation labels": "validation"}[line.data]
    return "test inputs" if line.split == "transductive" else data


def summary_columns() -> list[Column]:
    """All columns but the tasks'."""
    return [MEAN, NORMALISED, WORST, *COSTS, DATA]


def _marked(line: Standing) -> str:
    failed = sum(row.status == "failed" for row in line.rows)
    if not failed:
        return line.label
    return f"{line.label} (failed)" if failed == len(line.rows) else f"{line.label} ({failed} failed)"


LABEL = Column("method", _marked)
WORDS = (LABEL, WORST, DATA)


def best_lines(lines: Sequence[Standing], column: Column) -> set[str]:
    """Labels of the methods whose number is the best of a column in their block; none where nothing is compared."""
    winners: set[str] = set()
    for _, block in groupby((line for line in lines if not line.is_reference), lambda line: line.block):
        numbers = {line.label: column.value(line) for line in block}
        known = {label: value for label, value in numbers.items() if value is not None and not math.isnan(value)}
        if column.best is None or len(known) < 2:
            continue
        top = max(known.values()) if column.best == "high" else min(known.values())
        winners |= {label for label, value in known.items() if math.isclose(value, top, abs_tol=1e-9)}
    return winners


def league_table(report: Report, *, width: int = 100) -> RenderableType:
    """The league for a terminal of `width` columns, best method per column bold, failures under it with their reasons.

    Where not all tasks fit beside the summary, they come in a second table; where they do not fit there either,
    in several. What may not be compared stands in blocks of its own, as `Standing.block` says.
    """
    lines = standings(report)
    tasks, scores, costs = task_columns(report), [MEAN, NORMALISED, WORST], [*COSTS, DATA]
    stamp = f"accuracy in %, {split_stamp(report)}"
    if _fits(lines, [*tasks, *scores, *costs], width):
        groups = [[*tasks, *scores, *costs]]
    elif _fits(lines, [*scores, *costs], width):
        groups = [[*scores, *costs], *_split(lines, tasks, width)]
    else:
        groups = [[*scores, DATA], COSTS, *_split(lines, tasks, width)]
    titles = [f"{report.title} · {stamp}"]
    titles += [f"{'Costs' if group is COSTS else f'Per task · {stamp}'}" for group in groups[1:]]
    tables = [_rich(lines, [LABEL, *group], title) for group, title in zip(groups, titles, strict=True)]
    failures = (f"{line.label} failed: {reason}" for line in lines for reason in line.failures)
    parts: list[RenderableType] = [part for table in tables for part in (table, "")]
    return Group(*parts, *(Text(failure, style="red") for failure in failures))


def _fits(lines: Sequence[Standing], columns: Sequence[Column], width: int) -> bool:
    return sum(_width(lines, column) for column in [LABEL, *columns]) - GAP <= width


def _split(lines: Sequence[Standing], tasks: Sequence[Column], width: int) -> list[list[Column]]:
    """The tasks in as few tables as their columns need, of even width."""
    room = width - _width(lines, LABEL)
    fit = max(1, room // max((_width(lines, column) for column in tasks), default=1))
    each = math.ceil(len(tasks) / max(1, math.ceil(len(tasks) / fit)))
    return [list(tasks[start : start + each]) for start in range(0, len(tasks), each or 1)]


def _width(lines: Sequence[Standing], column: Column) -> int:
    return max(len(column.title), *(len(column.text(line)) for line in lines), 0) + GAP


def _rich(lines: Sequence[Standing], columns: Sequence[Column], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in columns:
        longest_word = max((len(word) for line in lines for word in column.text(line).split()), default=0)
        table.add_column(
            column.title,
            justify="left" if column in WORDS else "right",
            no_wrap=column not in WORDS,
            min_width=longest_word,
        )
    best = [best_lines(lines, column) for column in columns]
    several = len(blocks(lines)) > 1
    for block, group in groupby(lines, lambda line: line.block):
        if several and block != "references":
            table.add_row(Text(block, style="italic cyan"))
        for line in group:
            style = "dim" if line.is_reference else "red" if line.failures and not line.mean else ""
            cells = (
                Text(column.text(line), style="bold" if line.label in winners else "")
                for column, winners in zip(columns, best, strict=True)
            )
            table.add_row(*cells, style=style)
    return table


def blocks(lines: Sequence[Standing]) -> list[str]:
    """The blocks of methods, in order; the references are none."""
    return list(dict.fromkeys(line.block for line in lines if not line.is_reference))


def csv_table(report: Report) -> str:
    """The rows as CSV, one line per run, numbers unrounded and accuracies in [0, 1]; failures with their reasons.

    Columns: method, label, seed, split, data, one per task, mean, normalised, worst (the lowest normalised accuracy; or
    accuracy, without experts), worst_task, seconds, peak_bytes, numbers_trained, bytes_out, per_task, heads, status,
    error.
    """
    names = [task.name for task in report.tasks]
    head = ["method", "label", "seed", "split", "data"]
    tail = ["seconds", "peak_bytes", "numbers_trained", "bytes_out", "per_task", "heads"]
    tail += ["status", "error"]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*head, *names, "mean", "normalised", "worst", "worst_task", *tail])
    reference = report.reference("experts")
    experts = {task: score.accuracy for task, score in reference.scores.items()} if reference else {}
    for row in report.rows:
        found = {task: score.accuracy for task, score in row.scores.items()}
        whole = bool(found) and row.status == "ok"
        ratios = normalised(found, experts) if experts else found
        lowest = worst(ratios) if whole else (None, None)
        means = [
            mean(found) if whole else None,
            mean(ratios) if whole and experts else None,
            *lowest[::-1],
        ]
        cells = [getattr(row, name) for name in head], [found.get(task) for task in names], means
        out.writerow([*itertools.chain(*cells), *(getattr(row, name) for name in tail)])
    return text.getvalue()


def markdown_table(report: Report) -> str:
    """The league as a Markdown table with all columns, best method per column bold, failures listed under it."""
    lines = standings(report)
    columns = [LABEL, *task_columns(report), *summary_columns()]
    best = [best_lines(lines, column) for column in columns]
    rows = [
        [column.title for column in columns],
        [":--" if column in WORDS else "--:" for column in columns],
    ]
    several = len(blocks(lines)) > 1
    for block, group in groupby(lines, lambda line: line.block):
        if several and block != "references":
            rows.append([f"*{block}*", *[""] * (len(columns) - 1)])
        rows += [
            [_strong(c.text(line), line.label in winners) for c, winners in zip(columns, best, strict=True)]
            for line in group
        ]
    table = (f"| {' | '.join(row)} |" for row in rows)
    failures = [f"- {line.label} failed: {reason}" for line in lines for reason in line.failures]
    stamp = f"Accuracy in %; split: {split_stamp(report)}."
    return "\n".join([*table, "", stamp, *([""] if failures else []), *failures]) + "\n"


def _strong(text: str, strong: bool) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if strong else text
