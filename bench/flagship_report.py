"""What the cells of `flagship.py` say: a page of tables, and a picture of the main effects for each suite.

python bench/flagship_report.py docs/experiments        # writes docs/experiments/results.md and effects-*.svg

Of the suites whose cells are in the folder; those of an older version of a suite have a folder of their own.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import trials
from flagship import (
    CONFIRM,
    FACTORS,
    HALVED,
    HELD,
    LR,
    SETTLED,
    Cell,
    confirm,
    effects,
    factorial,
    features,
    gates,
    halved,
    held,
    levers,
    optimizers,
    pool,
    rates,
    settled,
    spoiled,
)

Cells = Sequence[Mapping[str, Any]]
LISTED = {
    "levers": levers,
    "pool": pool,
    "spoiled": spoiled,
    "rates": rates,
    "gates": gates,
    "features": features,
    "optimizers": optimizers,
}
"""Designs of which the cells are told one by one."""
FACTORIALS = (
    ("vision", "factorial", factorial, FACTORS),
    ("vision", "halved", halved, HALVED),
    ("text", "confirm", confirm, CONFIRM),
    ("vision", "settled", settled, SETTLED),
    ("text", "settled", settled, SETTLED),
    ("vision", "held", held, HELD),
    ("text", "held", held, HELD),
)


def main() -> None:
    out = Path(sys.argv[1])
    lines = ["# What came out", "", f"Written by `python bench/flagship_report.py {sys.argv[1]}`; do not edit.", ""]
    suites = [suite for suite in ("vision", "text") if (out / "cells" / f"{suite}-experts.json").is_file()]
    for suite in suites:
        version = json.loads((out / "cells" / f"{suite}-experts.json").read_text())["version"]
        lines += [f"All of {suite} stands on version {version} of the suite.", ""]
        lines += references(out, suite)
    for suite, name, design, factors in FACTORIALS:
        lines += fraction(out, suite, name, list(design(suite)), factors)
    for suite in suites:
        for name, chosen in LISTED.items():
            lines += listed(out, suite, name, list(chosen(suite)))
        for name in told(out, suite):
            lines += tried(out, suite, name, list(trials.DESIGNS[name](suite)))
    (out / "results.md").write_text("\n".join(lines))


def fraction(
    out: Path, suite: str, name: str, design: Sequence[Cell], factors: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Main effects of a design with their picture, and its cells; nothing before it is finished."""
    cells = [found for cell in design if (found := read(out, cell))]
    if len(cells) < len(design):
        return []
    lines = [f"## {suite}, `{name}`: main effects of {len(cells)} cells", ""]
    for measure, words in (("normalised", "mean over tasks, % of the experts"), ("worst", "worst task, %")):
        lines += [*table(effects(cells, measure, factors), words), ""]
    picture = out / f"effects-{suite}-{name}.svg"
    title = f"{suite}, {name}: points against the mean of all cells"
    picture.write_text(plot(effects(cells, "normalised", factors), title))
    return [*lines, f"![Main effects, {suite}, {name}]({picture.name})", "", *rows(cells), ""]


def listed(out: Path, suite: str, name: str, design: Sequence[Cell]) -> list[str]:
    """The finished cells of a design without effects."""
    lines = [f"## {suite}, `{name}`", ""]
    cells = [(cell, found) for cell in design if (found := read(out, cell))]
    if not cells:
        return []
    lines += ["| what moves | objective | step size | limit | balanced | pool | seed | mean | worst | held-out loss |"]
    lines += [f"| :-- | :-- |{' --: |' * 8}"]
    for cell, found in cells:
        moves = (cell.parametrisation, cell.objective, f"{cell.lr or LR[cell.parametrisation]:g}", cell.limit or "-")
        data = ("yes" if cell.balance else "no", cell.bad_pool or cell.pool, cell.seed)
        held_out = f"{found['held_out']:.3f}" if cell.hold_out else "-"
        scores = (f"{found['normalised']:.1f}", f"{found['worst']:.1f}", held_out)
        lines.append(f"| {' | '.join(map(str, (*moves, *data, *scores)))} |")
    return [*lines, ""]


def told(out: Path, suite: str) -> list[str]:
    """Designs of trials, but for those of which all that is finished belongs to another one as well."""
    found = {name: {t.key for t in design(suite) if read(out, t)} for name, design in trials.DESIGNS.items()}
    names = sorted((name for name in found if found[name]), key=lambda name: -len(found[name]))
    kept: list[str] = []
    for name in names:
        if not any(found[name] <= found[other] for other in kept):
            kept.append(name)
    return [name for name in trials.DESIGNS if name in kept]


def tried(out: Path, suite: str, name: str, design: Sequence[trials.Trial]) -> list[str]:
    """The finished trials of a design: mean and standard deviation over the runs that differ in seed or order alone."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for trial in design:
        if one := read(out, trial):
            bad = {"half": "two half-way back", "loud": "two with logits x 4"}.get(trial.bad, "-")
            step = f"{trial.lr:g}" if trial.lr else "the entry's"
            how = (step, f"x {trial.longer}", str(trial.batch or "the suite's"), str(trial.mix or "the method's"))
            inputs = str(trial.pool or "all") + (f" of {trial.split}" if trial.split else "")
            key = (trial.method, inputs, str(trial.tasks or "all"), *how, bad)
            found.setdefault(key, []).append(one)
    if not found:
        return []
    runs = sum(map(len, found.values()))
    lines = [f"## {suite}, `{name}`", "", f"{runs} of {len(design)} trials.", ""]
    head = ("method", "inputs a task", "tasks", "step", "updates", "batch", "mix", "bad experts")
    head += ("runs", "mean", "worst", "sound tasks", "s")
    lines += [f"| {' | '.join(head)} |", f"| :-- |{' --: |' * (len(head) - 1)}"]
    for key, ones in found.items():
        means = (spread([float(one[name]) for one in ones]) for name in ("normalised", "worst", "sound"))
        seconds = sum(one["seconds"] for one in ones) / len(ones)
        lines.append(f"| {' | '.join([*key, str(len(ones)), *means])} | {seconds:.0f} |")
    return [*lines, ""]


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{fmean(values):.1f} ± {stdev(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def read(out: Path, cell: Cell | trials.Trial) -> Mapping[str, Any] | None:
    file = out / "cells" / f"{cell.suite}-{cell.key}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def references(out: Path, suite: str) -> list[str]:
    found = [(start, read(out, Cell(suite, start, "none", "offset", steps=0))) for start in FACTORS["start"]]
    rows = [f"| {start} | {one['normalised']:.1f} | {one['worst']:.1f} |" for start, one in found if one]
    head = [f"## {suite}: starts alone", "", "| start | mean | worst task |", "| :-- | --: | --: |"]
    return [*head, *rows, ""] if rows else []


def table(found: Mapping[str, Mapping[str, tuple[float, float]]], words: str) -> list[str]:
    lines = [f"Effect on the {words}, against the mean of all cells, with its 95 % interval:", ""]
    lines += ["| factor | level | effect |", "| :-- | :-- | --: |"]
    for factor, levels in found.items():
        lines += [f"| {factor} | {level} | {value:+.1f} ± {half:.1f} |" for level, (value, half) in levels.items()]
    return lines


def rows(cells: Cells) -> list[str]:
    lines = ["| start | objective | parametrisation | schedule | held out | balanced | seed | mean | worst task | s |"]
    lines += ["| :-- | :-- | :-- | :-- | --: | :-- | --: | --: | --: | --: |"]
    for one in sorted(cells, key=lambda one: -float(one["normalised"])):
        cell = one["cell"]
        lines.append(
            f"| {cell['start']} | {cell['objective']} | {cell['parametrisation']} | {cell['schedule']} "
            f"| {cell['hold_out']:g} | {'yes' if cell['balance'] else 'no'} | {cell['seed']} "
            f"| {one['normalised']:.1f} | {one['worst']:.1f} | {one['seconds']:.0f} |"
        )
    return lines


def plot(found: Mapping[str, Mapping[str, tuple[float, float]]], title: str) -> str:
    """Dots with whiskers, one line a level, factors apart."""
    flat = [(factor, level, *value) for factor, levels in found.items() for level, value in levels.items()]
    reach = max(abs(value) + half for _, _, value, half in flat) * 1.05
    left, width, step = 190, 420, 20

    def x(value: float) -> float:
        return left + width * (value + reach) / (2 * reach)

    parts, y, before = [], 40, ""
    for factor, level, value, half in flat:
        if factor != before:
            y += 12
            parts.append(f'<text x="8" y="{y + 4}" font-weight="600">{factor}</text>')
            before = factor
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{level}</text>')
        low, high = x(value - half), x(value + half)
        parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#5b7fa6"/>')
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="#1f5fa8"/>')
        parts.append(f'<text x="{left + width + 8}" y="{y + 4}">{value:+.1f}</text>')
        y += step
    axis = f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="40" y2="{y}" stroke="#999" stroke-dasharray="3 3"/>'
    size = left + width + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {y + 10}" width="{size}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="20" font-size="14" font-weight="600">{title}</text>{axis}{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
