"""From rows to a league: means over tasks and seeds, normalisation by the experts, errors, ranking. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from calmerge._pipe import DataUse
from calmerge.report.results import REFERENCES, Heads, Report, Row, Score, Split


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `n` runs; `sd` is None for a single run.

    >>> print(Spread(0.5, None, 1), Spread(0.5, 0.0123, 3))
    50.0 50.0 ± 1.2
    """

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + ("" if self.sd is None else f" ± {100 * self.sd:.1f}")


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1 in the denominator) of at least one value.

    >>> spread([0.25, 0.75])
    Spread(mean=0.5, sd=0.3535533905932738, n=2)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    square = math.fsum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(square / (len(values) - 1)), len(values))


def mean(values: Mapping[str, float]) -> float:
    """The unweighted mean over tasks.

    >>> mean({"cars": 0.5, "dtd": 0.75})
    0.625
    """
    return math.fsum(values.values()) / len(values)


def normalised(accuracy: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """Per task, accuracy over the accuracy of the task's own expert; NaN where the expert has none right.

    The normalised mean is the mean of these ratios, not the ratio of the two means:

    >>> ratios = normalised({"cars": 0.5, "dtd": 0.9}, {"cars": 0.5, "dtd": 1.0})
    >>> ratios, mean(ratios)
    ({'cars': 1.0, 'dtd': 0.9}, 0.95)
    """
    return {task: value / experts[task] if experts[task] else math.nan for task, value in accuracy.items()}


def worst(values: Mapping[str, float]) -> tuple[str, float]:
    """The task with the lowest value, the first of them if several share it; NaN only where there is nothing else.

    >>> worst({"cars": 0.9, "dtd": 0.7, "svhn": 0.7})
    ('dtd', 0.7)
    """
    return min(values.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy measured on `n` independent examples, sqrt(a (1 - a) / n).

    >>> standard_error(0.8, 400)
    0.02
    """
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mean_error(scores: Mapping[str, Score]) -> float:
    """Standard error, from the sizes of the test splits, of the mean over tasks.

    Two methods tested on the same examples usually differ with less noise than that.

    >>> mean_error({"cars": Score(accuracy=0.8, n=400), "dtd": Score(accuracy=1.0, n=100)})
    0.01
    """
    return math.hypot(*(standard_error(s.accuracy, s.n) for s in scores.values())) / len(scores)


@dataclass(frozen=True)
class Standing:
    """One line of the league: a method's runs, summarised over seeds. Numbers are None if all runs failed.

    Args:
        method, label: as in the rows.
        rows: the runs, in order.
        tasks: accuracy per task, in the report's order.
        relative: accuracy per task over its expert's; None without a row of experts.
        mean, normalised_mean: mean over tasks, spread over seeds.
        worst: the task of the lowest normalised accuracy (accuracy without experts), averaged over seeds.
        error: standard error of the mean from the sizes of the test splits.
        seconds, peak_bytes: mean seconds, highest peak.
        numbers_trained, bytes_out: the largest of the runs.
        data, split, per_task, heads: as in the rows.
        failures: the distinct reasons of failed runs.
    """

    method: str
    label: str
    rows: tuple[Row, ...]
    tasks: Mapping[str, Spread] | None
    relative: Mapping[str, Spread] | None
    mean: Spread | None
    normalised_mean: Spread | None
    worst: tuple[str, float] | None
    error: float | None
    seconds: float | None
    peak_bytes: int | None
    numbers_trained: int | None
    bytes_out: int | None
    data: DataUse
    split: Split
    per_task: bool
    heads: Heads
    failures: tuple[str, ...]

    @property
    def is_reference(self) -> bool:
        """Whether this is the base or the experts, which take no rank."""
        return self.method in REFERENCES

    @property
    def block(self) -> str:
        """What it may be compared with: methods that give as many models, saw as little and have the same heads."""
        if self.is_reference:
            return "references"
        parts = ["a model per task" if self.per_task else "one model"]
        parts += ["transductive"] * (self.split == "transductive") + ["heads realigned"] * (self.heads != "frozen")
        return ", ".join(parts)


def standings(report: Report) -> list[Standing]:
    """The league of a report: base, experts, then the methods block by block, from best to worst mean.

    Blocks come from what asks least of its user to what asks most: one model, inductive, frozen heads first, a model
    for each task last. Failed ones stand last in their block, in order.

    >>> report = Report(title="", created="2026-01-31", tasks=[{"name": "cars"}], rows=[
    ...     {"method": "ties", "label": "TIES", "scores": {"cars": {"accuracy": 0.5, "n": 10}}},
    ...     {"method": "calm", "label": "CALM", "seed": 0, "scores": {"cars": {"accuracy": 0.7, "n": 10}}},
    ...     {"method": "calm", "label": "CALM", "seed": 1, "scores": {"cars": {"accuracy": 0.9, "n": 10}}},
    ...     {"method": "experts", "label": "Experts", "scores": {"cars": {"accuracy": 1.0, "n": 10}}}],
    ...     versions={"calmerge": "0.1.0", "torch": "2.9", "python": "3.11", "platform": "Linux"})
    >>> [(line.label, str(line.normalised_mean)) for line in standings(report)]
    [('Experts', '100.0'), ('CALM', '80.0 ± 14.1'), ('TIES', '50.0')]
    """
    experts = report.reference("experts")
    accuracies = {task: score.accuracy for task, score in experts.scores.items()} if experts else None
    order = {label: i for i, label in enumerate(dict.fromkeys(row.label for row in report.rows))}
    rows = sorted(report.rows, key=lambda row: order[row.label])
    lines = [_standing(report, list(group), accuracies) for _, group in groupby(rows, lambda row: row.label)]

    def rank(line: Standing) -> tuple[bool | int | float, ...]:
        if line.is_reference:
            return (-1, REFERENCES.index(line.method))
        block = (line.per_task, line.heads != "frozen", line.split == "transductive")
        return (*block, line.mean is None, -line.mean.mean if line.mean else 0.0)

    return sorted(lines, key=rank)


def _standing(report: Report, rows: Sequence[Row], experts: Mapping[str, float] | None) -> Standing:
    done = [row for row in rows if row.status == "ok"]
    scored = [row for row in done if row.scores]
    names = [task.name for task in report.tasks]
    runs = [{task: row.scores[task].accuracy for task in names} for row in scored]
    ratios = [normalised(run, experts) for run in runs] if experts else []
    tasks = {task: spread([run[task] for run in runs]) for task in names} if runs else None
    relative = {task: spread([run[task] for run in ratios]) for task in names} if ratios else None
    compared = relative or tasks
    return Standing(
        method=rows[0].method,
        label=rows[0].label,
        rows=tuple(rows),
        tasks=tasks,
        relative=relative,
        mean=spread([mean(run) for run in runs]) if runs else None,
        normalised_mean=spread([mean(run) for run in ratios]) if ratios else None,
        worst=worst({task: value.mean for task, value in compared.items()}) if compared else None,
        error=spread([mean_error(row.scores) for row in scored]).mean if runs else None,
        seconds=_mean_known([row.seconds for row in done]),
        peak_bytes=_largest([row.peak_bytes for row in done]),
        numbers_trained=_largest([row.numbers_trained for row in done]),
        bytes_out=_largest([row.bytes_out for row in done]),
        data=rows[0].data,
        split=rows[0].split,
        per_task=rows[0].per_task,
        heads=rows[0].heads,
        failures=tuple(dict.fromkeys(row.error for row in rows if row.error)),
    )


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def ranked(report: Report) -> list[Standing]:
    """The evaluated methods of the first block, which compete for the lead, from best to worst."""
    lines = [line for line in standings(report) if line.mean and not line.is_reference]
    return [line for line in lines if line.block == lines[0].block]


def headline(report: Report) -> str:
    """One sentence: which method leads, by how much over the next, on which split.

    >>> headline(Report(title="", created="2026-01-31", versions={"calmerge": "", "torch": "", "python": "",
    ...                                                          "platform": ""}))
    'No method has been evaluated.'
    """
    lines = ranked(report)
    if not lines or not lines[0].mean or lines[0].error is None:
        return "No method has been evaluated."
    best, score, error = lines[0], lines[0].mean, lines[0].error
    tasks = f"on average over {len(report.tasks)} tasks" if len(report.tasks) > 1 else f"on {report.tasks[0].name}"
    share = f", {100 * best.normalised_mean.mean:.1f} % of what the experts reach" if best.normalised_mean else ""
    asides = [best.split] * (best.split != "none") + [f"{score.n} seeds"] * (score.n > 1)
    sentence = f"{best.label} leads with {score} % accuracy {tasks}{share}"
    sentence += f" ({', '.join(asides)})" if asides else ""
    if len(lines) == 1 or not lines[1].mean:
        return sentence + "."
    lead = score.mean - lines[1].mean.mean
    noise = "" if lead > error else f", less than the sampling error of {100 * error:.1f}"
    return f"{sentence}: {100 * lead:.1f} points over {lines[1].label}, the next best{noise}."


def split_stamp(report: Report) -> str:
    """The split on which the report's numbers stand, all of them named if methods differ.

    >>> split_stamp(Report(title="", created="2026-01-31", protocol={"split": "inductive"}, versions={
    ...     "calmerge": "", "torch": "", "python": "", "platform": ""}))
    'inductive'
    """
    splits = {report.protocol.split, *(row.split for row in report.rows)} - {"none"}
    return " + ".join(sorted(splits)) or "no data used"
