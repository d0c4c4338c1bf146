"""Small pieces of charts as SVG: colours and fonts come from classes, so that one drawing serves light and dark pages.

Lengths are pixels at natural size. Marks carry a `<title>`, which browsers show when the pointer rests on them.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from calmerge.report.markup import Html, el
from calmerge.report.traces import Histogram

FONT = 11.5
SERIES = 8  # colours; further series are dashed


def chart(width: float, height: float, label: str, *parts: str) -> Html:
    """An SVG image that shrinks with the page; `label` is what a screen reader says.

    >>> chart(10, 5, "nothing")
    '<svg class="chart" viewBox="0 0 10 5" width="10" role="img" aria-label="nothing" xmlns="...svg"></svg>'
    """
    return el(
        "svg",
        *parts,
        class_="chart",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start", turn: float = 0) -> Html:
    """Text at (x, y), its baseline at y, turned by `turn` degrees.

    >>> text(1, 2, "a & b", anchor="end")
    '<text x="1" y="2" text-anchor="end">a &amp; b</text>'
    """
    return el(
        "text",
        words,
        x=x,
        y=y,
        class_=class_ or None,
        text_anchor=None if anchor == "start" else anchor,
        transform=f"rotate({turn:g} {x:.1f} {y:.1f})" if turn else None,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> Html:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, w: float, h: float, class_: str, title: str = "", opacity: float | None = None) -> Html:
    """A rectangle; what has no area is drawn with none."""
    box = {"x": x, "y": y, "width": max(w, 0), "height": max(h, 0), "fill_opacity": opacity}
    return el("rect", *_title(title), class_=class_, **box)


def dot(x: float, y: float, class_: str, title: str = "", r: float = 4) -> Html:
    """A disc."""
    return el("circle", *_title(title), cx=x, cy=y, r=r, class_=class_)


def _title(words: str) -> tuple[Html, ...]:
    return (el("title", words),) if words else ()


def text_width(words: str, size: float = FONT) -> float:
    """Roughly how wide a text will be; on the safe side.

    >>> text_width("CALM", 10)
    24.0
    """
    return 0.6 * size * len(words)


def clip(words: str, width: float, size: float = FONT) -> str:
    """`words`, cut in the middle if they would be wider than `width`.

    >>> clip("diagnoses of patients", 70, 10)
    'diagno…ents'
    """
    room = int(width / (0.6 * size))
    if len(words) <= room:
        return words
    tail = max(0, (room - 1) * 2 // 5)
    return words[: max(1, room - 1 - tail)] + "…" + words[len(words) - tail :]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`.

    >>> ticks(0, 1, 5), ticks(0.62, 1.03, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.7, 0.8, 0.9, 1.0])
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)) + 1)
    return [round(i * step, digits) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis.

    >>> short(0.25), short(1500), short(5_300_000), short(0), short(1e-4)
    ('0.25', '1.5k', '5.3M', '0', '0.0001')
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Neighbouring tensors of one layer, as (label, first, after last); the layer is the first number in a name.

    >>> groups(["enc.layer.0.a", "enc.layer.0.b", "enc.layer.1.a", "head.weight"])
    [('0', 0, 2), ('1', 2, 3), ('head', 3, 4)]
    """
    found, start = [], 0
    for label, members in itertools.groupby(names, _layer):
        size = len(list(members))
        found.append((label, start, start + size))
        start += size
    return found


def _layer(name: str) -> str:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return number[1] if number else name.split(".")[0]


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    label: str,
    span: float,
    cell: float = 30,
    digits: int = 2,
    diagonal: bool = False,
) -> Html:
    """A matrix as coloured cells with numbers; strength of colour is |value| / span, its hue the sign.

    `diagonal` says whether cells of a task with itself are coloured too.
    """
    left = min(110, max(map(text_width, rows), default=0)) + 8
    top = min(80, max(map(text_width, columns), default=0)) * 0.72 + 14
    parts = [text(left - 6, top + cell * (i + 0.62), clip(n, left - 8), "tick", "end") for i, n in enumerate(rows)]
    parts += [text(left + cell * (j + 0.45), top - 6, clip(n, 80), "tick", turn=-42) for j, n in enumerate(columns)]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = left + cell * j, top + cell * i
            known = math.isfinite(value) and (diagonal or rows[i] != columns[j])
            strength = min(1.0, abs(value) / span) * 0.7 if known and span else 0.0
            words = f"{value:.{digits}f}"
            hover = f"{rows[i]} and {columns[j]}: {words}"
            parts.append(rect(x + 1, y + 1, cell - 2, cell - 2, _sign(value), hover, strength))
            parts.append(text(x + cell / 2, y + cell * 0.62, words.replace("0.", "."), "cell", "middle"))
    width, height = left + cell * len(columns) + 44, top + cell * len(rows) + 4
    return chart(width, height, label, *parts)


def _sign(value: float) -> str:
    return "plus" if value >= 0 else "minus"


def strip(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, label: str, span: float
) -> Html:
    """A wide matrix of thin cells without numbers: `values[i][j]` of `rows[i]` and tensor `columns[j]`, by layer."""
    left = min(110, max(map(text_width, rows), default=0)) + 8
    cell, step = 20.0, max(8.0, min(40.0, 1000 / max(1, len(columns))))
    parts = [text(left - 6, 4 + cell * (i + 0.7), clip(n, left - 8), "tick", "end") for i, n in enumerate(rows)]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            strength = min(1.0, abs(value) / span) if math.isfinite(value) and span else 0.0
            hover = f"{rows[i]}, {columns[j]}: {value:.3f}"
            parts.append(rect(left + step * j, 4 + cell * i, step - 1, cell - 2, _sign(value), hover, strength))
    bottom = 4 + cell * len(rows)
    parts += _layer_axis(columns, left, step, bottom)
    return chart(left + step * len(columns) + 6, bottom + 34, label, *parts)


def _layer_axis(names: Sequence[str], left: float, step: float, bottom: float) -> Iterator[Html]:
    for label, first, last in groups(names):
        x1, x2 = left + step * first, left + step * last - 1
        yield line(x1, bottom + 4, x2, bottom + 4, "axis")
        if text_width(label, 10) <= x2 - x1 + 6:
            yield text((x1 + x2) / 2, bottom + 16, label, "tick", "middle")
    yield text(left + step * len(names) / 2, bottom + 30, "layer", "tick", "middle")


def tensor_bars(names: Sequence[str], values: Sequence[float], *, label: str) -> Html:
    """One upright bar per tensor, a share in per cent, neighbours of one layer under one label."""
    left, top, height = 44.0, 10.0, 130.0
    step = max(8.0, min(40.0, 1000 / max(1, len(names))))
    high = max([*values, 1e-6]) * 1.05
    parts: list[Html] = []
    for tick in ticks(0, 100 * high, 4):
        y = top + height * (1 - tick / (100 * high))
        parts += [line(left, y, left + step * len(names), y), text(left - 5, y + 4, f"{tick:g} %", "tick", "end")]
    for i, (_, first, last) in enumerate(groups(names)):
        for j in range(first, last):
            h = height * values[j] / high
            hover = f"{names[j]}: {100 * values[j]:.2f} %"
            parts.append(rect(left + step * j, top + height - h, step - 1, h, "bar" if i % 2 else "accent", hover))
    parts += _layer_axis(names, left, step, top + height)
    return chart(left + step * len(names) + 6, top + height + 34, label, *parts)


def columns(values: Sequence[float], *, label: str, x_title: str, width: float = 340, height: float = 170) -> Html:
    """Upright bars over the numbers 1, 2, ... of updates."""
    left, top, bottom = 46.0, 10.0, height - 34
    known = [value if math.isfinite(value) else 0.0 for value in values]
    high = max([*known, 1.0]) * 1.05
    step = (width - left - 8) / max(1, len(known))
    parts: list[Html] = []
    for tick in ticks(0, high, 4):
        y = bottom - (bottom - top) * tick / high
        parts += [line(left, y, width - 8, y), text(left - 5, y + 4, short(tick), "tick", "end")]
    for i, value in enumerate(known):
        h = (bottom - top) * value / high
        hover = f"{x_title} {i + 1}: {value:,.0f}"
        parts.append(rect(left + step * i, bottom - h, step * 0.82, h, "accent", hover))
    parts += _update_axis(len(known), left, width - 8, bottom, x_title)
    return chart(width, height, label, *parts)


def _update_axis(count: int, left: float, right: float, bottom: float, title: str) -> Iterator[Html]:
    yield line(left, bottom, right, bottom, "axis")
    for tick in ticks(0, count, 5):
        x = left + (right - left) * tick / max(1, count)
        yield text(x, bottom + 15, f"{tick:g}", "tick", "middle")
    yield text((left + right) / 2, bottom + 30, title, "tick", "middle")


def curves(
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    x_title: str = "update",
    width: float = 340,
    height: float = 230,
) -> Html:
    """Lines over the numbers of updates, each named at its right end; values that are not finite leave a gap."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    low, high = min([*finite, 0.0]), max(finite, default=1.0)
    high = high if high > low else low + 1
    left, top, bottom = 38.0, 10.0, height - 34
    right = width - min(96, max((text_width(name, 10.5) for name in series), default=0)) - 12
    count = max((len(values) for values in series.values()), default=1)

    def place(i: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * i / max(1, count - 1)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    parts: list[Html] = []
    for tick in ticks(low, high, 5):
        y = place(0, tick)[1]
        parts += [line(left, y, right, y), text(left - 5, y + 4, short(tick), "tick", "end")]
    ends = []
    for k, (name, values) in enumerate(series.items()):
        style = f"line s{k % SERIES}" + (" dashed" if k >= SERIES else "")
        known = [place(i, value) for i, value in enumerate(values) if math.isfinite(value)]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in known)
        last = next((value for value in reversed(values) if math.isfinite(value)), math.nan)
        if known:
            parts.append(el("path", el("title", f"{name}: last {last:.3g}"), d=path, class_=style))
            ends.append((known[-1][1], name, f"name f{k % SERIES}"))
    ys = spaced([y for y, _, _ in ends], 12, top, bottom - 3)
    for y, (_, name, style) in zip(ys, ends, strict=True):
        parts.append(text(right + 6, y + 4, clip(name, 96, 10.5), style))
    parts += _update_axis(count, left, right, bottom, x_title)
    return chart(width, height, label, *parts)


def spaced(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved apart, in order, so that neighbours keep `gap` and all lie from `low` to `high` if they can.

    >>> spaced([10, 11, 40], 12, 0, 44)
    [10, 22, 40]
    >>> spaced([43, 44], 12, 0, 44)
    [32, 44]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [max(places[i], low) for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    found = [0.0] * len(places)
    for i, value in zip(order, moved, strict=True):
        found[i] = value
    return found


def log_histogram(
    histogram: Histogram, threshold: float, *, label: str, width: float = 340, height: float = 230
) -> Html:
    """Logarithmic counts over logarithmic bins, values at or below zero apart at the left, `threshold` as a line."""
    left, top, bottom, apart = 44.0, 26.0, height - 40, 34.0
    high = math.log10(max([*histogram.counts, histogram.non_positive, 10])) * 1.03
    low_x, high_x = math.log10(histogram.edges[0]), math.log10(histogram.edges[-1])
    marked = 0 < threshold < math.inf
    high_x = max(high_x, math.log10(threshold) + 0.1) if marked else high_x
    start, end = left + apart + 10, width - 10

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) - low_x) / (high_x - low_x)

    def bar(x: float, w: float, count: int, style: str, hover: str) -> Html:
        h = (bottom - top) * (math.log10(count) + 0.02) / high if count else 0.0
        return rect(x, bottom - h, w, h, style, f"{hover}: {count:,}")

    parts: list[Html] = []
    for power in range(0, math.floor(high) + 1, max(1, math.ceil(high / 5))):
        y = bottom - (bottom - top) * power / high
        parts += [line(left, y, end, y), text(left - 5, y + 4, short(10.0**power), "tick", "end")]
    parts.append(bar(left + 2, apart - 4, histogram.non_positive, "bar", "F ≤ 0"))
    parts.append(text(left + apart / 2, bottom + 15, "≤ 0", "tick", "middle"))
    for lower, upper, count in histogram.bins():
        style = "accent" if math.sqrt(lower * upper) > threshold else "bar"
        parts.append(
            bar(place(lower), place(upper) - place(lower) - 0.8, count, style, f"F {lower:.3g} to {upper:.3g}")
        )
    powers = range(math.ceil(low_x), math.floor(high_x) + 1)
    for power in powers[:: max(1, math.ceil(len(powers) / 7))]:
        if place(10.0**power) - text_width(f"{10.0**power:g}", 10.5) / 2 > left + apart:
            parts.append(text(place(10.0**power), bottom + 15, f"{10.0**power:g}", "tick", "middle"))
    parts += [line(left, bottom, left + apart, bottom, "axis"), line(start, bottom, end, bottom, "axis")]
    if marked and math.log10(threshold) > low_x:
        x = place(threshold)
        words = f"flips: F > {threshold:.3g}"
        near_end = x + text_width(words, 10.5) > width
        parts += [line(x, top - 8, x, bottom, "mark")]
        parts += [text(x - 4 if near_end else x + 4, top - 10, words, "note", "end" if near_end else "start")]
    parts.append(
        text((start + end) / 2, bottom + 32, "F = \N{MINUS SIGN}lr · G · d; both axes logarithmic", "tick", "middle")
    )
    return chart(width, height, label, *parts)
