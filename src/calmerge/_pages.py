"""One page for each method, and their index, made of docstrings and signatures.

`python -m calmerge._pages docs/methods` writes them. They are committed, and a test holds them to what is generated.
"""

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from calmerge._catalogue import Entry, catalogue
from calmerge._explain import Explanation, explanation

_NOTE = "<!-- Written by `python -m calmerge._pages docs/methods` from the docstring; do not edit. -->"


def pages() -> dict[str, str]:
    """By file name, the text of every page.

    >>> list(pages())[:2]
    ['README.md', 'adamerging.md']
    """
    entries = catalogue()
    made = {f"{entry.method}.md": page(entry, explanation(entry.method)) for entry in entries}
    return {"README.md": index(entries), **dict(sorted(made.items()))}


def index(entries: Sequence[Entry]) -> str:
    """The table of all methods, by group."""
    lines = [_NOTE, "", "# Methods", ""]
    lines += [
        "`calmerge list` prints this table, `calmerge explain METHOD` one of the pages. *Passes*: how often base and "
        "experts are read, the writing included. *Class*: A one entry at a time, B one whole tensor of all experts, "
        "C a number over the whole model first, E fitted to data.",
        "",
    ]
    for group, members in groupby(entries, key=lambda entry: entry.group):
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        lines += [
            "| method | what comes out | needs | passes | class | paper |",
            "| :-- | :-- | :-- | --: | :-- | :-- |",
        ]
        for entry in members:
            needs = "weights" if entry.data == "none" else f"{entry.data} inputs"
            lines.append(
                f"| [`{entry.method}`]({entry.method}.md) | {_cell(entry.summary)} | {needs} "
                f"| {entry.passes if entry.passes is not None else 'fit'} | {entry.memory} | {entry.paper} |"
            )
        lines.append("")
    return "\n".join(lines)


def page(entry: Entry, found: Explanation) -> str:
    """All that is known of one method."""
    lines = [_NOTE, "", f"# `{found.name}`", "", found.summary, ""]
    lines += [f"{entry.paper} · {entry.group} · {found.cost}", ""]
    if found.formula:
        lines += ["```text", found.formula, "```", ""]
    if found.options:
        lines += ["| option | type | range | default | meaning |", "| :-- | :-- | :-- | :-- | :-- |"]
        for option in found.options:
            cells = (_cell(option[key]) for key in ("type", "range", "default", "meaning"))
            lines.append(f"| `{option['name']}` | {' | '.join(cells)} |")
        lines.append("")
    lines += ["```yaml", found.recipe.rstrip(), "```", ""]
    if found.example:
        lines += ["```python", found.example.rstrip(), "```", ""]
    return "\n".join([*lines, found.source, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(folder: Path) -> None:
    """Write the pages, and take away those of methods that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
