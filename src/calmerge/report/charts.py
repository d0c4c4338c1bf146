"""The report's own charts, from its numbers to SVG."""

import math
from collections.abc import Sequence
from importlib.resources import files

from calmerge.report.league import Standing, split_stamp, standard_error, standings
from calmerge.report.markup import Html, el, join
from calmerge.report.results import Report
from calmerge.report.svg import chart, clip, dot, line, rect, short, text, text_width, ticks
from calmerge.report.tables import blocks, duration
from calmerge.report.traces import Coverage, FrontTrace

ROW = 19.0  # height of a method's line


def summary_svg(report: Report, *, width: float = 640) -> str:
    """A picture for a README: per method the normalised mean (disc) and its worst task (ring), best on top.

    It stands alone: its colours come with it and follow the reader's light or dark theme.
    """
    drawing = summary_chart(report, width=width, stamp=split_stamp(report))
    css = files("calmerge.report").joinpath("colours.css").read_text("utf-8")
    return drawing.replace(">", f">{el('style', Html(css.replace(':root', 'svg')))}", 1)


def summary_chart(report: Report, *, width: float = 420, stamp: str = "") -> Html:
    """The drawing of `summary_svg`, without colours of its own; `stamp` is printed beside what is measured."""
    lines = [line_ for line_ in standings(report) if line_.mean and line_.method != "experts"]
    found_blocks = blocks(lines)
    order = {block: i for i, block in enumerate(["references", *found_blocks])}
    lines = sorted(
        (found for found in lines if math.isfinite(_level(found))),
        key=lambda found: (max(1, order[found.block]), -_level(found)),  # the base stands among the first
    )
    names = min(0.4 * width, max((text_width(found.label) for found in lines), default=0) + 8)
    left, right, top = names + 4, width - 112, 26.0
    worsts = [found.worst[1] for found in lines if found.worst and not found.is_reference]
    low, high = _range([_level(found) for found in lines] + worsts, bool(lines and lines[0].normalised_mean))
    heads = len(found_blocks) if len(found_blocks) > 1 else 0
    bottom = top + ROW * 1.25 * (len(lines) + heads)

    def place(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    what = "% of the experts' accuracy" if lines and lines[0].normalised_mean else "accuracy, %"
    parts = [text(4, 16, f"{what}, {stamp}" if stamp else what, "note")]
    parts += [dot(width - 98, 12, "accent", r=4.5), text(width - 56, 16, "mean", "tick strong", "end")]
    parts += [dot(width - 45, 12, "ring"), text(width - 6, 16, "worst", "tick", "end")]
    for tick in ticks(low, high, 4):
        parts += [line(place(tick), top, place(tick), bottom)]
        parts += [text(place(tick), bottom + 15, f"{100 * tick:g}", "tick", "middle")]
    leader, shown = _leader(lines), 0
    for i, found in enumerate(lines):
        if heads and shown < max(1, order[found.block]):
            parts.append(text(4, top + ROW * 1.25 * (i + shown + 0.5) + 6, found_blocks[shown], "note strong"))
            shown += 1
        y = top + ROW * 1.25 * (i + shown + 0.5)
        style = "ref" if found.is_reference else "accent" if found.label == leader else "plain"
        score, score_text = _level(found), f"{100 * _level(found):.1f}"
        strong = " strong" if style == "accent" else ""
        parts.append(text(left - 8, y + 4, clip(found.label, names), "label" + strong, "end"))
        if found.worst and not found.is_reference:
            hover = f"{found.label}, worst task {found.worst[0]}: {100 * found.worst[1]:.1f}"
            parts += [
                line(place(found.worst[1]), y, place(score), y, "stem"),
                dot(place(found.worst[1]), y, "ring", hover),
            ]
            parts += [text(width - 6, y + 4, f"{100 * found.worst[1]:.1f}", "value", "end")]
        parts.append(dot(place(score), y, style, f"{found.label}, mean: {score_text}", r=5))
        parts.append(text(width - 56, y + 4, score_text, "value" + strong, "end"))
    label = "Mean and worst task per method: " + ", ".join(f"{f.label} {100 * _level(f):.1f}" for f in lines)
    return chart(width, bottom + 24, label, *parts)


def _level(found: Standing) -> float:
    score = found.normalised_mean or found.mean
    return score.mean if score else math.nan


def _leader(lines: Sequence[Standing]) -> str | None:
    """The best of the first block."""
    methods = [found for found in lines if found.mean and not found.is_reference]
    methods = [found for found in methods if found.block == blocks(methods)[0]]
    return max(methods, key=lambda found: found.mean.mean if found.mean else 0).label if methods else None


def cost_chart(report: Report, *, width: float = 420, height: float = 300) -> Html:
    """What time buys: a disc per method, seconds (a logarithmic axis) against the mean.

    Named are those of the first block that no other one beats in both; the rest say who they are when pointed at.
    """
    known = [found for found in standings(report) if found.seconds and math.isfinite(_level(found))]
    lines = [found for found in known if not found.is_reference]
    if len(lines) < 2:
        return Html("")
    first = blocks(lines)[0]
    low, high = _range([_level(found) for found in lines], lines[0].normalised_mean is not None)
    times = [found.seconds or 1 for found in lines]
    start, end = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)) + 1e-9)
    left, right, top, bottom = 34.0, width - 14, 26.0, height - 34

    def at(found: Standing) -> tuple[float, float]:
        share = (math.log10(found.seconds or 1) - start) / max(1, end - start)
        return left + (right - left) * share, bottom - (bottom - top) * (_level(found) - low) / (high - low)

    parts = [text(4, 14, "% of the experts' accuracy" if lines[0].normalised_mean else "accuracy, %", "note")]
    for tick in ticks(low, high, 5):
        y = bottom - (bottom - top) * (tick - low) / (high - low)
        parts += [line(left, y, right, y), text(left - 6, y + 4, f"{100 * tick:g}", "tick", "end")]
    for power in range(start, end + 1):
        x = left + (right - left) * (power - start) / max(1, end - start)
        parts += [
            line(x, top, x, bottom),
            text(x, bottom + 15, f"{10.0**power:g} s", "tick", "end" if power == end else "middle"),
        ]
    taken: list[tuple[float, float]] = []
    for found in sorted(lines, key=lambda found: -_level(found)):
        x, y = at(found)
        best = found.block == first and not any(
            other.block == first and (other.seconds or 0) < (found.seconds or 0) and _level(other) >= _level(found)
            for other in lines
        )
        style = "accent" if best else "plain" if found.block == first else "ring"
        hover = f"{found.label}: {100 * _level(found):.1f} in {duration(found.seconds)} ({found.block})"
        parts.append(dot(x, y, style, hover, r=4.5))
        if best and all(abs(y - other) > 13 or abs(x - across) > 150 for across, other in taken):
            taken.append((x, y))
            over = x + 8 + text_width(found.label) > right
            parts.append(text(x - 8 if over else x + 8, y + 4, found.label, "name", "end" if over else "start"))
    parts.append(text(right, height - 4, "time to merge", "note", "end"))
    label = "Mean against time: " + ", ".join(
        f"{f.label} {100 * _level(f):.1f} in {duration(f.seconds)}" for f in lines
    )
    return chart(width, height, label, *parts)


def _range(values: Sequence[float], with_expert: bool) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] + ([1.0] if with_expert else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    return max(0.0, math.floor(20 * (low - 0.01)) / 20), math.ceil(50 * (high + 0.001)) / 50


def task_chart(report: Report, task: str, *, width: float = 340) -> Html:
    """One task: per method a bar from the base's level to the method's, as shares of the expert's accuracy.

    Whiskers are one standard error from the number of test examples. All tasks share one axis.
    """
    evaluated = [found for found in standings(report) if found.tasks and found.method != "experts"]
    lines = [found for found in evaluated if not found.is_reference]
    base = next((found for found in evaluated if found.is_reference and math.isfinite(_share(found, task))), None)
    everything = [_share(found, other.name) for found in evaluated for other in report.tasks]
    low, high = _range(everything, report.reference("experts") is not None)
    names = min(0.43 * width, max((text_width(found.label, 10.5) for found in lines), default=0) + 4)
    left, right, top = names + 6, width - 44, 4.0
    bottom = top + ROW * len(lines)

    def place(value: float) -> float:
        return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

    parts: list[Html] = []
    for tick in ticks(low, high, 4):
        parts.append(line(place(tick), top, place(tick), bottom))
        parts.append(text(place(tick), bottom + 14, f"{100 * tick:g}", "tick", "middle"))
    start = place(_share(base, task)) if base else left
    best = max((_share(found, task) for found in lines), default=math.nan)
    for i, found in enumerate(lines):
        y, value = top + ROW * (i + 0.5), _share(found, task)
        style = "accent" if found.label == _leader(lines) else "bar"
        style = "below" if base and value < _share(base, task) else style
        strong = " strong" if math.isclose(value, best, abs_tol=1e-9) else ""
        parts.append(text(left - 6, y + 4, clip(found.label, names, 10.5), "name", "end"))
        if not math.isfinite(value):
            continue
        end, error, hover = place(value), _share_error(found, task), _hover(found, task)
        parts.append(rect(min(start, end), y - 5, abs(end - start), 10, style, hover))
        parts.append(line(place(value - error), y, place(value + error), y, "whisker"))
        parts.append(text(width - 4, y + 4, f"{100 * value:.1f}", "value" + strong, "end"))
    if base:
        parts.append(line(start, top - 2, start, bottom + 2, "base"))
    if report.reference("experts"):
        parts.append(line(place(1), top - 2, place(1), bottom + 2, "expert"))
    label = f"{task}: " + ", ".join(f"{f.label} {100 * _share(f, task):.1f}" for f in lines)
    return chart(width, bottom + 20, label, *parts)


def _share(found: Standing, task: str) -> float:
    values = found.relative or found.tasks
    return values[task].mean if values else math.nan


def _share_error(found: Standing, task: str) -> float:
    score = next(row.scores[task] for row in found.rows if row.status == "ok" and row.scores)
    accuracy = found.tasks[task].mean if found.tasks else math.nan
    scale = _share(found, task) / accuracy if accuracy else 1.0
    return standard_error(accuracy, score.n) * scale


def _hover(found: Standing, task: str) -> str:
    values = found.tasks
    if not values:
        return found.label
    return (
        f"{found.label}: accuracy {values[task]} %, {100 * _share(found, task):.1f} normalised, {values[task].n} run(s)"
    )


def coverage_chart(task: str, classes: dict[str, Coverage], *, width: float = 220, height: float = 84) -> Html:
    """Per class of one task: how many pool examples its expert assigns to it, and how many of them were kept."""
    top, bottom = 4.0, height - 6
    high = max((found.predicted for found in classes.values()), default=0) or 1
    step = min(26.0, (width - 4) / max(1, len(classes)))
    parts: list[Html] = []
    for i, (name, found) in enumerate(classes.items()):
        x, hover = 2 + step * i, f"{name}: {found.kept} kept of {found.predicted}"
        outer, inner = ((bottom - top) * count / high for count in (found.predicted, found.kept))
        parts.append(rect(x, bottom - outer, step * 0.84, outer, "bar", hover))
        parts.append(rect(x, bottom - inner, step * 0.84, inner, "accent", hover))
        if not found.kept:
            parts.append(dot(x + step * 0.42, bottom - 3, "alarm", hover, r=min(3.0, step * 0.4)))
    parts.append(line(0, bottom, width, bottom, "axis"))
    kept, predicted = (sum(getattr(f, key) for f in classes.values()) for key in ("kept", "predicted"))
    return chart(width, height, f"{task}: {kept} of {predicted} examples kept, {len(classes)} classes", join(*parts))


def norm_chart(norms: dict[str, float], *, width: float = 340) -> Html:
    """Lengths of the task vectors as bars from zero."""
    names = min(0.38 * width, max(map(text_width, norms), default=0) + 4)
    left, right, high = (
        names + 6,
        width - 52,
        max([value for value in norms.values() if math.isfinite(value)] + [1e-12]),
    )
    parts: list[Html] = []
    for i, (name, value) in enumerate(norms.items()):
        y = 4 + ROW * (i + 0.5)
        parts.append(text(left - 6, y + 4, clip(name, names), "label", "end"))
        if math.isfinite(value):
            parts.append(rect(left, y - 5, (right - left) * max(value, 0) / high, 10, "bar", f"{name}: {value:.4g}"))
        parts.append(text(width - 4, y + 4, f"{value:.3g}", "value", "end"))
    label = "Norms: " + ", ".join(f"{name} {value:.3g}" for name, value in norms.items())
    return chart(width, 8 + ROW * len(norms), label, *parts)


def front_chart(trace: FrontTrace, *, width: float = 460, height: float = 260) -> Html:
    """A front of trade-offs: two tasks as the axes of a plane, more of them side by side with a line for each merge.

    The merge that was taken is drawn on top, as predicted, and as measured (a ring).
    """
    across = len(trace.tasks)
    predicted = [point.predicted for point in trace.points]
    values = [value for row in [*predicted, trace.measured] for value in row]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin
    left, right, top, bottom = 46.0, width - 12, 8.0, height - 40

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts: list[Html] = []
    for tick in ticks(low, high, 4):
        parts += [line(left, y(tick), right, y(tick)), text(left - 5, y(tick) + 4, short(tick), "value", "end")]
    names = f"{len(trace.points)} merges, predicted {'accuracy' if trace.labelled else 'divergence'}"
    taken = predicted[trace.chosen]
    if across == 2:

        def x(value: float) -> float:
            return left + (right - left) * (value - low) / (high - low)

        for tick in ticks(low, high, 5):
            parts += [line(x(tick), top, x(tick), bottom), text(x(tick), bottom + 14, short(tick), "value", "middle")]
        first, second = trace.tasks
        parts.append(text((left + right) / 2, height - 6, first, "label", "middle"))
        parts.append(text(11, (top + bottom) / 2, second, "label", "middle", turn=-90))
        for row in predicted:
            parts.append(dot(x(row[0]), y(row[1]), "bar", _said(trace, row), r=3))
        parts.append(dot(x(taken[0]), y(taken[1]), "accent", f"taken: {_said(trace, taken)}", r=5))
        found = trace.measured
        parts.append(dot(x(found[0]), y(found[1]), "ring", f"measured: {_said(trace, found)}"))
        return chart(width, height, names, *parts)
    places = [left + (right - left) * (i + 0.5) / across for i in range(across)]
    for place, name in zip(places, trace.tasks, strict=True):
        parts.append(line(place, top, place, bottom))
        parts.append(text(place, bottom + 16, clip(name, (right - left) / across), "label", "middle"))
    for row, class_ in [*((row, "faint") for row in predicted), (taken, "taken")]:
        points = " ".join(f"{px:.1f},{y(value):.1f}" for px, value in zip(places, row, strict=True))
        parts.append(el("polyline", el("title", _said(trace, row)), points=points, class_=f"front {class_}"))
    for place, name, value in zip(places, trace.tasks, trace.measured, strict=True):
        parts.append(dot(place, y(value), "ring", f"measured: {name} {value:.4f}"))
    return chart(width, height, names, *parts)


def _said(trace: FrontTrace, row: Sequence[float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(trace.tasks, row, strict=True))
