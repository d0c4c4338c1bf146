"""The parts of the page: every function turns one part of a report into markup, or an empty part into nothing."""

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import yaml

from calmerge.report.charts import cost_chart, coverage_chart, front_chart, norm_chart, summary_chart, task_chart
from calmerge.report.league import Standing, ranked, split_stamp, standings
from calmerge.report.markup import Html, el, join
from calmerge.report.results import Analysis, Report, Row
from calmerge.report.svg import columns, curves, heat, log_histogram, short, strip, tensor_bars
from calmerge.report.tables import (
    COSTS,
    DATA,
    LABEL,
    MEAN,
    NORMALISED,
    WORST,
    Column,
    best_lines,
    blocks,
    duration,
    percent,
    size,
    task_columns,
)
from calmerge.report.traces import CalmStage, CalmTrace, Coefficients, Coverage, FitTrace, FrontTrace, SearchTrace

NOTHING = Html("")
_FEW = 10  # lines of the first drawing that are no higher than what stands beside it
_SHORT = 10  # options of a search that stand open
UNFOLDED = 4
"""So many fits stand open on the page."""


def section(title: str, *children: str, id_: str) -> Html:
    """A part of the page with its heading."""
    return el("section", el("h2", title, id=f"{id_}-title"), *children, id=id_, aria_labelledby=f"{id_}-title")


def figure(title: str, drawing: Html, caption: str = "", *, stamp: str = "", wide: bool = False) -> Html:
    """A drawing with its title, a stamp saying which split its numbers stand on, and a caption; `wide` ones scroll."""
    if wide:
        drawing = el("div", drawing, class_="scroll", tabindex=0, role="region", aria_label=title)
    badge = el("span", stamp, class_=f"stamp {stamp.split()[0]}") if stamp else NOTHING
    words = el("p", caption, class_="caption") if caption else NOTHING
    head = el("figcaption", el("span", title, class_="figure-title"), " ", badge)
    return el("figure", head, drawing, words, class_="wide" if wide else None)


def grid(*children: str, class_: str = "grid") -> Html:
    """Children side by side, as many as fit."""
    return el("div", *children, class_=class_)


def tiles(report: Report) -> Html:
    """The numbers to remember: level, lead, worst task and cost of the leading method."""
    lines = [(line, line.mean) for line in ranked(report) if line.mean]
    if not lines:
        return NOTHING
    best, score = lines[0]
    shown = [(percent((best.normalised_mean or score).mean), "%", f"{best.label}: {_of_what(best)}")]
    if len(lines) > 1:
        next_best, after = lines[1]
        shown.append((f"+{100 * (score.mean - after.mean):.1f}", "points", f"mean accuracy over {next_best.label}"))
    if best.worst:
        shown.append((percent(best.worst[1]), "%", f"on its worst task, {best.worst[0]}"))
    if best.seconds is not None:
        value, unit = duration(best.seconds).split()
        shown.append((value, unit, "to merge" + (f", {size(best.peak_bytes)} at peak" if best.peak_bytes else "")))
    stamp = el("p", _stamp(report))
    figures = (
        el("div", el("p", value, el("small", f" {unit}"), class_="big"), el("p", what), stamp, class_="tile")
        for value, unit, what in shown
    )
    return grid(*figures, class_="tiles")


def _of_what(line: Standing) -> str:
    return "mean share of the experts' accuracy" if line.normalised_mean else "mean accuracy"


def overview(report: Report) -> Html:
    """The chart of means and worst tasks, and the protocol beside it."""
    if not any(line.mean for line in standings(report)):
        return NOTHING
    protocol = report.protocol
    facts = [
        ("Split", _split_words(split_stamp(report))),
        ("Heads", protocol.heads),
        ("Adapted on", protocol.adapted_on),
        ("Options", protocol.selection),
        ("Seeds", ", ".join(map(str, report.seeds)) or "none"),
        ("Test examples", ", ".join(f"{t.name} {t.n_test}" for t in report.tasks if t.n_test) or "not stated"),
    ]
    drawing = figure(
        "Mean over tasks, and worst task",
        summary_chart(report, width=560),
        "Disc: mean over tasks of accuracy divided by the accuracy of the task's own expert. Ring: the lowest of them.",
        stamp=split_stamp(report),
    )
    how = el("div", el("h3", "How it was measured"), description(facts), *map(_paragraph, protocol.notes))
    costs = cost_chart(report)
    words = (
        "A disc per method; coloured and named are those than which none is both faster and better. Rings: methods of"
        " other blocks of the league. Point at one for its name."
    )
    price = figure("What time buys", costs, words, stamp=split_stamp(report)) if costs else NOTHING
    if len(standings(report)) <= _FEW:  # the drawing leaves room under it
        return section("Result", grid(el("div", drawing, price), how), id_="result")
    return section("Result", grid(drawing, el("div", how, price)), id_="result")


def _paragraph(words: str) -> Html:
    return el("p", words, class_="caption")


def _split_words(stamp: str) -> str:
    meaning = {
        "inductive": "inductive: no method saw a test input",
        "transductive": "transductive: methods adapted on the test inputs (without labels)",
    }
    return meaning.get(stamp, stamp)


def description(facts: Sequence[tuple[str, str]]) -> Html:
    """Terms with what they are."""
    return el("dl", *(join(el("dt", term), el("dd", what)) for term, what in facts))


def league(report: Report) -> Html:
    """The table of methods, sortable; failed runs under it with their reasons."""
    lines = standings(report)
    if not lines:
        return NOTHING
    shown = [LABEL, MEAN, NORMALISED, WORST, *task_columns(report), *COSTS, DATA]
    best = {column.title: best_lines(lines, column) for column in shown}
    head = el("tr", *(_heading(column, i) for i, column in enumerate(shown)))
    bodies = []
    several = len(blocks(lines)) > 1
    for block, group in groupby(lines, lambda line: line.block):
        if several and block != "references":
            words = el("th", el("span", block), colspan=len(shown), scope="rowgroup")
            bodies.append(el("tbody", el("tr", words), class_="block"))
        rows = (_league_row(line, shown, best) for line in group)
        bodies.append(el("tbody", *rows, class_="references" if block == "references" else "methods"))
    caption = el("caption", "Accuracy on test data, % ", _stamp(report), class_="figure-title")
    table = el("table", caption, el("thead", head), *bodies, class_="league")
    failures = [el("li", el("b", line.label), f" failed: {why}") for line in lines for why in line.failures]
    scroll = el("div", table, class_="scroll", tabindex=0, role="region", aria_label="League of methods")
    notes = el("p", _league_words(several), class_="caption")
    return section(
        "League", scroll, notes, el("ul", *failures, class_="failures") if failures else NOTHING, id_="league"
    )


def _league_words(several: bool) -> str:
    words = (
        "± is the standard deviation over seeds; bold is best of the methods. Trained: numbers that were fitted. Size:"
        " bytes of what comes out, heads aside."
    )
    if several:
        words += (
            " Blocks are not compared with each other: a method that keeps something for each task has to be told the"
            " task of every input, and a transductive one has seen the inputs that it is tested on."
        )
    return words


def _stamp(report: Report) -> Html:
    words = split_stamp(report)
    return el("span", words, class_=f"stamp {words.split()[0]}")


def _heading(column: Column, index: int) -> Html:
    words = column in (LABEL, DATA)
    button = el("button", column.title, type="button", data_kind="text" if words else "number")
    order = "descending" if column is MEAN else "none"
    return el("th", button, scope="col", aria_sort=order, class_="words" if words or column is WORST else None)


def _league_row(line: Standing, shown: Sequence[Column], best: dict[str, set[str]]) -> Html:
    cells = []
    for column in shown[1:]:
        value = column.value(line)
        key = None if value is None or math.isnan(value) else f"{value:.9g}"
        style = "words" if column in (WORST, DATA) else ""
        style += " best" if line.label in best[column.title] else ""
        hover = column.text(line) if column is WORST else None
        cells.append(el("td", column.text(line), class_=style.strip() or None, data_v=key, title=hover))
    options = ", ".join(f"{name}={value}" for name, value in line.rows[0].options.items())
    name = el("th", LABEL.text(line), scope="row", title=options or None)
    return el("tr", name, *cells, class_="failed" if line.failures and not line.mean else None)


def per_task(report: Report) -> Html:
    """One chart per task, all on one axis, and what the methods predict."""
    lines = [line for line in standings(report) if line.tasks and not line.is_reference]
    if not lines:
        return NOTHING
    titles = {task.name: task.title or task.name for task in report.tasks}
    stamp = split_stamp(report)
    figures = [figure(titles[task], task_chart(report, task), stamp=stamp) for task in titles]
    words = "Per cent of the accuracy of the task's own expert (solid line). " if report.reference("experts") else ""
    if report.reference("base"):
        words += "Bars start at the base with the experts' heads (dashed line); orange ones fall short of it. "
    words += "Whiskers: one standard error from the number of test examples. All tasks share one axis."
    return section("Task by task", el("p", words), grid(*figures), collapse(report, lines), id_="tasks")


def collapse(report: Report, lines: Sequence[Standing]) -> Html:
    """How often the most frequent class is predicted: a model that answers one class only is seen here at once."""
    names = [task.name for task in report.tasks]
    tops = {line.label: [_top_share(line, name) for name in names] for line in lines}
    if not any(value is not None for row in tops.values() for value in row):
        return NOTHING
    head = el("tr", el("th", "method", scope="col"), *(el("th", name, scope="col") for name in names))
    rows = (el("tr", el("th", label, scope="row"), *(el("td", percent(v)) for v in row)) for label, row in tops.items())
    table = el("table", el("thead", head), el("tbody", *rows))
    scroll = el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Most predicted class")
    title = el("summary", "Share of predictions that fall on the most predicted class, % ", _stamp(report))
    return el("details", title, scroll)


def _top_share(line: Standing, task: str) -> float | None:
    counts = [row.scores[task].predicted for row in line.rows if task in row.scores]
    shares = [max(found) / sum(found) for found in counts if found and sum(found)]
    return math.fsum(shares) / len(shares) if shares else None


def vectors(analysis: Analysis | None) -> Html:
    """Norms, cosines and sign conflicts of the task vectors, and the tensors that were not merged."""
    if analysis is None:
        return NOTHING
    tasks, stamp = analysis.tasks, "weights only"
    figures = []
    if analysis.cosines:
        span = max((abs(v) for i, r in enumerate(analysis.cosines) for j, v in enumerate(r) if i != j), default=1.0)
        drawing = heat(tasks, tasks, analysis.cosines, label="Cosines between task vectors", span=span)
        figures.append(figure("Cosines", drawing, "1 means the same direction, 0 none in common.", stamp=stamp))
    if analysis.sign_conflicts:
        drawing = heat(tasks, tasks, analysis.sign_conflicts, label="Share of entries with opposed signs", span=0.5)
        figures.append(figure("Sign conflicts", drawing, "Share of entries that pull in opposite ways.", stamp=stamp))
    if analysis.norms:
        drawing = norm_chart(analysis.norms)
        figures.append(figure("Norms", drawing, "How far fine-tuning moved each expert.", stamp=stamp))
    return section("Task vectors", grid(*figures), _left_out(analysis), id_="vectors")


def _left_out(analysis: Analysis) -> Html:
    if not analysis.left_out:
        return NOTHING
    rows = [[found.name, found.action, found.reason] for found in analysis.left_out]
    words = f"{len(rows)} tensor{'s' if len(rows) > 1 else ''} not merged"
    return el("details", el("summary", words), plain_table(["tensor", "what happened", "reason"], rows))


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table of words, scrolling where it is too wide."""
    body = (el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows)
    table = el("table", el("thead", el("tr", *(el("th", h, scope="col") for h in head))), el("tbody", *body))
    return el("div", el("div", table, class_="words"), class_="scroll", tabindex=0, role="region", aria_label=head[0])


def fits(report: Report) -> Html:
    """How the fitted methods went: the first seed of each in full, or folded where there are many; others folded."""
    fitted = [line for line in standings(report) if any(_has_curves(row.trace) for row in line.rows)]
    found = []
    for line in fitted:
        label, first, *more = line.label, *(row for row in line.rows if _has_curves(row.trace))
        folded = [el("details", el("summary", _run_name(label, row)), _trace(report, row)) for row in more]
        if len(fitted) > UNFOLDED:
            found.append(el("details", el("summary", label), _trace(report, first), *folded))
        else:
            found += [el("h3", _run_name(label, first)), _trace(report, first), *folded]
    return section("Inside the fits", *found, id_="fits") if found else NOTHING


def _has_curves(trace: CalmTrace | FitTrace | SearchTrace | FrontTrace | None) -> bool:
    """Whether there is anything to draw; statistics of activations leave a trace without."""
    return bool(trace.loss or trace.coefficients) if isinstance(trace, FitTrace) else trace is not None


def _run_name(label: str, row: Row) -> str:
    return label if row.seed is None else f"{label}, seed {row.seed}"


def _trace(report: Report, row: Row) -> Html:
    stamp = row.split if row.split != "none" else row.data
    match row.trace:
        case CalmTrace() as trace:
            return join(*calm(trace, stamp))
        case FitTrace() as trace:
            return fit(trace, stamp)
        case SearchTrace() as trace:
            return searched(trace, stamp)
        case FrontTrace() as trace:
            return front(trace, stamp)
    return NOTHING


def front(trace: FrontTrace, stamp: str) -> Html:
    """A front: all of its merges as a drawing, and the one taken and the best of each task as a table."""
    words = "Every merge that no other one is predicted to beat at all tasks; the one that was taken is drawn on top."
    words += " A ring is what was measured of it."
    return join(figure("Front", front_chart(trace), words, stamp=stamp), plain_table(*trace.table()))


def searched(trace: SearchTrace, stamp: str) -> Html:
    """A search: the best score after every trial, and what was taken."""
    best = list(
        itertools.accumulate((sum(t.scores) / len(t.scores) if t.scores else -math.inf for t in trace.trials), max)
    )
    drawing = curves({"best": [b for b in best if math.isfinite(b)]}, label="Best score so far", x_title="trial")
    source = "labelled validation split" if trace.labelled else "unlabelled pools"
    words = f"{trace.strategy}, {len(trace.trials)} trials, score {trace.score} on the {source}."
    values = trace.trials[trace.best].values.items()
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in values]
    table = plain_table(["option", "value"], rows)
    taken = el("details", el("summary", "What was taken"), table, open=len(rows) <= _SHORT)
    return join(figure("Search", drawing, words, stamp=stamp), taken)


def calm(trace: CalmTrace, stamp: str) -> Iterator[Html]:
    """CALM: its start, what the sampler kept, and every stage."""
    if trace.start:
        yield el("p", f"Start: {', '.join(trace.start)} merged at once; then one task a stage, each through a mask.")
    for i, stage in enumerate(trace.stages):
        yield el("h4", f"Stage {i + 1}: {stage.task} joins {len(stage.seen) - 1} tasks")
        yield el("p", _stage_facts(stage))
        yield grid(*_stage_figures(stage, stamp))
    if trace.samplers:
        yield el("h4", "What the sampler kept")
        words = (
            "Per class (one bar each): examples of the pool that the expert assigns to it, and in colour those kept as"
            " credible. A dot marks a class of which nothing is left."
        )
        yield el("p", words)
        yield grid(*(_coverage(task, classes, stamp) for task, classes in trace.samplers.items()), class_="grid small")


def _stage_facts(stage: CalmStage) -> str:
    return (
        f"{100 * stage.taken:.2f} % of {stage.entries:,} maskable entries were taken from {stage.task}. "
        f"Step size {stage.lr:.3g}, {len(stage.flips)} updates, {sum(stage.flips):,} flips."
    )


def _stage_figures(stage: CalmStage, stamp: str) -> Iterator[Html]:
    if stage.loss:
        drawing = curves(stage.loss, label=f"Loss per task while {stage.task} joins")
        yield figure("Loss of each task seen", drawing, "At the soft mask, on pseudo-labels.", stamp=stamp)
    if stage.flips:
        drawing = columns(stage.flips, label="Mask entries flipped per update", x_title="update", height=230)
        yield figure("Flips per update", drawing, "Entries whose rounded mask changed.", stamp=stamp)
    if stage.histogram:
        above = sum(count for low, high, count in stage.histogram.bins() if math.sqrt(low * high) > stage.threshold)
        share = 100 * above / max(1, stage.histogram.total)
        drawing = log_histogram(stage.histogram, stage.threshold, label="Histogram of F at the first update")
        caption = f"F pulls a mask entry open. {share:.2g} % of the entries lie beyond the threshold (coloured bins)."
        yield figure("Force F at the first update", drawing, caption, stamp=stamp)
    if stage.density:
        names, shares = [d.name for d in stage.density], [d.share for d in stage.density]
        drawing = tensor_bars(names, shares, label=f"Share taken from {stage.task} per tensor")
        yield figure("Mask density per tensor, by layer", drawing, stamp=stamp, wide=True)


def _coverage(task: str, classes: dict[str, Coverage], stamp: str) -> Html:
    lost = [name for name, found in classes.items() if not found.kept]
    kept, predicted = (sum(getattr(found, key) for found in classes.values()) for key in ("kept", "predicted"))
    words = f"{kept:,} of {predicted:,} kept" + (f"; nothing left of {', '.join(lost)}" if lost else "")
    return figure(task, coverage_chart(task, classes), words, stamp=stamp)


def fit(trace: FitTrace, stamp: str) -> Html:
    """A method fitted by gradient: its loss, and the coefficients it learned."""
    figures = []
    if trace.loss:
        drawing = curves({"loss": trace.loss}, label="Loss per step", x_title="step")
        figures.append(figure("Loss", drawing, stamp=stamp))
    if trace.per_task:
        drawing = curves(trace.per_task, label="Loss per task and step", x_title="step")
        figures.append(figure("Loss of each task", drawing, stamp=stamp))
    if trace.coefficients:
        figures.append(_coefficients(trace.coefficients, stamp))
    return grid(*figures)


def _coefficients(found: Coefficients, stamp: str) -> Html:
    span = max((abs(v) for row in found.values for v in row if math.isfinite(v)), default=1.0)
    if len(found.tensors) == 1:
        drawing = norm_chart(dict(zip(found.tasks, found.values[0], strict=True)))
        return figure("Coefficients", drawing, stamp=stamp)
    by_task = list(zip(*found.values, strict=True))
    drawing = strip(found.tasks, found.tensors, by_task, label="Coefficients per task and tensor", span=span)
    words = f"Strength of colour: 0 to {short(span)}. Rest on a cell for its tensor and value."
    return figure("Coefficients, task by tensor", drawing, words, stamp=stamp, wide=True)


def provenance(report: Report) -> Html:
    """Everything needed to make the report again."""
    versions = report.versions.model_dump(exclude_none=True)
    facts = [("Made", report.created), ("Command", report.command or "a call from Python")]
    if report.suite:
        suite = report.suite
        facts.append(
            ("Suite", f"{suite.name}, version {suite.version}" + (f", blake3 {suite.blake3}" if suite.blake3 else ""))
        )
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    facts.append(("Seeds", ", ".join(map(str, report.seeds)) or "none"))
    parts = [description(facts)]
    if report.tasks:
        rows = [
            [
                t.name,
                t.title or "",
                str(len(t.classes) or ""),
                *(_count(n) for n in (t.n_pool, t.n_validation, t.n_test)),
            ]
            for t in report.tasks
        ]
        head = ["task", "title", "classes", "pool", "validation", "test"]
        parts.append(el("details", el("summary", "Tasks and their splits"), plain_table(head, rows)))
    if report.inputs:
        rows = [[n, i.label, i.revision or "", i.licence or "", i.blake3 or ""] for n, i in report.inputs.items()]
        head = ["input", "label", "revision", "licence", "blake3"]
        parts.append(el("details", el("summary", "Inputs and their hashes"), plain_table(head, rows)))
    if report.recipe:
        text = yaml.safe_dump(report.model_dump(mode="json")["recipe"], sort_keys=False, allow_unicode=True)
        parts.append(el("details", el("summary", "Recipe"), el("pre", el("code", text), tabindex=0), open=True))
    return section("Provenance", *parts, id_="provenance")


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
