"""Results on the terminal, as text and tables."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from calmerge._catalogue import Entry
    from calmerge._explain import Explanation
    from calmerge._settings import Setting
    from calmerge.inspect import Inspection
    from calmerge.report.results import Report
    from calmerge.report.traces import FrontTrace

WIDTH = 110
"""Columns where the output is no terminal."""


def emit(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    """The data as JSON, or what `show` makes of them."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        show()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table without lines; columns named in `right` are numbers."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=any(head), box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in head:
        grid.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    _console().print(grid)


def text(words: str = "") -> None:
    """Text as it is."""
    _console().print(words, markup=False, highlight=False, soft_wrap=True)


def report(found: "Report", folder: "Path", *, as_json: bool) -> None:
    """The league and where the page is."""
    from calmerge.report.results import dumps
    from calmerge.report.tables import league_table

    if as_json:
        sys.stdout.write(dumps(found) + "\n")
        return
    console = _console()
    console.print(league_table(found, width=console.width))
    text(f"report: {folder / 'report.html'}")


def preview(found: Mapping[str, Any]) -> None:
    """What a merge is going to do."""
    from rich.filesize import decimal

    memory = f"{decimal(found['memory'])} at most" if found["memory"] else found["held"] or "not known before the fit"
    reads = f"{decimal(found['inputs'])} of base and experts"
    if found["passes"]:
        times = "once" if found["passes"] == 1 else f"{found['passes']} times"
        reads += f", {times}: {decimal(found['reads'])}"
    rows = [
        ["merge", " -> ".join(found["steps"])],
        ["experts", ", ".join(found["tasks"])],
        ["merged", f"{found['merged']} tensors, {found['entries']:,} entries"],
        *(["not merged", f"{n} tensors: {reason}"] for reason, n in found["skipped"].items()),
        ["heads", ", ".join(f"{task} {n}" for task, n in found["heads"].items() if n) or "none"],
        ["data", found["data"]],
        ["reads", reads],
        ["writes", f"{decimal(found['writes'])} in {found['files']} file{'s' if found['files'] > 1 else ''}"],
        ["memory", f"{memory} (class {found['kind']}{_threads(found)})"],
        ["out", found["out"] or "not said: name a folder with --out"],
    ]
    table(["", ""], rows)


def _threads(found: Mapping[str, Any]) -> str:
    return f", {found['threads']} thread{'s' if found['threads'] > 1 else ''}" if found["threads"] else ""


def merged(manifest: Mapping[str, Any], where: str) -> None:
    """What was merged; of a model per task, what the shared vector and each patch cost."""
    from rich.filesize import decimal

    text(f"merged {manifest['merged']} tensors into {where}")
    if "modules" in manifest:
        adapter(manifest["modules"])
    if "storage" in manifest:
        cost = manifest["storage"]
        rows = [
            ["base", decimal(cost["model"])],
            ["shared vector", decimal(cost["shared"])],
            *([f"patch of {task}", decimal(size)] for task, size in cost["patches"].items()),
            *([["router", decimal(cost["router"])]] if "router" in cost else []),
            ["all", f"{decimal(cost['all'])}; the experts take {decimal(cost['experts'])}"],
        ]
        table(["", ""], rows)
        if manifest["heads"] == "frozen":
            text(f"calmerge export {where} --task NAME writes the model of one task.")


def front(trace: "FrontTrace") -> None:
    """A front of trade-offs among tasks: the merge that was taken, and the best one of each task."""
    head, rows = trace.table()
    table(head, rows, right=head[1:])
    text("Another one of them: the same command with another --out and --preference, and --front with this folder.")


def adapter(modules: Sequence[Mapping[str, Any]], where: "Path | None" = None) -> None:
    """What became of every tensor in an adapter, with its error."""
    rows = [
        [
            row["name"], row["kind"] + (f" ({row['why']})" if row["why"] else ""), str(row["rank"] or ""),
            f"{row['norm']:.4g}", f"{row['error']:.2e}" if row["error"] else "0", f"{100 * row['energy']:.2f} %",
        ]
        for row in modules
    ]  # fmt: skip
    head = ["tensor", "kept as", "rank", "norm of the change", "error", "energy"]
    table(head, rows, right=head[2:])
    square = sum(row["norm"] ** 2 for row in modules)
    missing = sum((row["error"] * row["norm"]) ** 2 for row in modules)
    text(f"all together: norm {square**0.5:.4g}, error {(missing / square) ** 0.5 if square else 0:.2e} of it")
    if where is not None:
        text(f"wrote {where}")


def scores(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Accuracy by task, in per cent, with its standard error."""
    who = list(found)
    tasks = list(found["merged"])
    rows = [[t, *(_accuracy(found[w][t]["accuracy"], found[w][t]["n"]) for w in who)] for t in tasks]
    means = {w: sum(s["accuracy"] for s in found[w].values()) / len(tasks) for w in who}
    rows.append(["mean", *(f"{100 * means[w]:.1f}" for w in who)])
    if "experts" in found:
        own = {t: max(score["accuracy"], 1e-12) for t, score in found["experts"].items()}
        shares = (sum(found[w][t]["accuracy"] / own[t] for t in tasks) / len(tasks) for w in who)
        rows.append(["of the experts", *(f"{100 * share:.1f}" for share in shares)])
    table(["task", *who], rows, right=who)


def inspection(found: "Inspection") -> None:
    """Norms, then the two matrices, then what is odd."""
    tasks = list(found.tasks)
    text(
        f"{found.entries:,} merged entries in {len(found.tensor_norms)} tensors; "
        f"the base's norm is {found.base_norm:.4g}"
    )
    text()
    rows = [
        [
            t,
            f"{found.norms[t]:.4g}",
            f"{found.relative[t]:.4f}",
            f"{found.base_cosines[t]:.4f}",
            f"{found.zeros[t]:.3f}",
        ]
        for t in tasks
    ]
    head = ["task vector", "norm", "norm / base", "cosine of weights to base", "zeros"]
    table(head, rows, right=head[1:])
    for title, matrix in (
        ("cosines between task vectors", found.cosines),
        ("share of entries with opposite signs", found.sign_conflicts),
    ):
        if len(tasks) > 1:
            text()
            values = [[t, *(f"{v:.3f}" for v in row)] for t, row in zip(tasks, matrix, strict=True)]
            table([title, *tasks], values, right=tasks)
    text()
    for line in _odd(found):
        text(line)


def explained(found: "Explanation") -> None:
    """A method in words."""
    text(f"{found.name}: {found.summary}")
    if found.formula:
        text("\n" + found.formula)
    if found.options:
        text()
        keys = ["name", "type", "range", "default", "meaning"]
        table(["option", *keys[1:]], [[o[k] for k in keys] for o in found.options])
    text(f"\ndata needed: {found.data}" + (f"\ncost: {found.cost}" if found.cost else ""))
    if found.source:
        text(f"\n{found.source}")
    for title, block in (("in a recipe", found.recipe), ("in Python", found.example)):
        if block:
            text(f"\n{title}:\n\n" + "\n".join("  " + line for line in block.splitlines()))


def settings(rows: "Sequence[Setting]") -> None:
    """Every parameter of a recipe; the tensors only where they are not all."""
    some = any(s.tensors for s in rows)
    lines, before = [], None
    for s in rows:
        place = (s.step, s.tensors)
        held = ", ".join(s.tensors) + (f" ({len(s.names)} tensors)" if s.names else "")
        told = [s.step, *([held] if some else [])] if place != before else ["", *([""] if some else [])]
        value = "" if not s.option else "-" if s.value is None else str(s.value)
        lines.append([*told, s.option, value, s.origin])
        before = place
    table(["step", *(["tensors"] if some else []), "option", "value", "from"], lines)


def methods(entries: Sequence["Entry"]) -> None:
    """The methods, one table for each group; the last column is cut where the terminal ends."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    wide = {name: max(len(str(getattr(e, name))) for e in entries) for name in ("method", "paper")}
    for group in dict.fromkeys(e.group for e in entries):
        grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), expand=True)
        for head, width in (
            (group, wide["method"]),
            ("needs", 10),
            ("passes", 6),
            ("class", 5),
            ("paper", wide["paper"]),
        ):
            grid.add_column(head, width=width, no_wrap=True, justify="right" if head == "passes" else "left")
        grid.add_column("what comes out", no_wrap=True, overflow="ellipsis", ratio=1)
        for e in (e for e in entries if e.group == group):
            needs = "weights" if e.data == "none" else e.data
            passes = "fit" if e.passes is None else str(e.passes)
            grid.add_row(*map(Text, [e.method, needs, passes, e.memory, e.paper, e.summary]))
        console.print(grid)
        console.print()
    text(
        "passes: how often base and experts are read, with the defaults. class: what is held (A chunks, B whole\n"
        "tensors, C numbers over the model first, E what is learned). 'calmerge explain NAME' says more."
    )


def _odd(found: "Inspection") -> list[str]:
    lines = []
    if found.untouched:
        lines.append(f"moved by no expert: {_some(found.untouched)}")
    lines += [f"left as it was by '{task}': {_some(names)}" for task, names in found.frozen.items()]
    for task, head in found.heads.items():
        if head:
            lines.append(f"head of '{task}': " + _some([f"{name} {tuple(shape)}" for name, shape in head.items()]))
    for reason in dict.fromkeys(found.skipped.values()):
        lines.append(f"not merged ({reason}): {_some([n for n, r in found.skipped.items() if r == reason])}")
    lines += [f"warning: {warning}" for warning in found.warnings]
    if not found.warnings:
        lines.append("The checkpoints seem to share this base.")
    return lines


def _some(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _accuracy(accuracy: float, n: int) -> str:
    error = (accuracy * (1 - accuracy) / n) ** 0.5
    return f"{100 * accuracy:.1f} ± {100 * error:.1f}"


def _console() -> Any:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=WIDTH)
