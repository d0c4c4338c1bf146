"""The committed pages of methods are those that docstrings and signatures give."""

from pathlib import Path

from calmerge._pages import pages
from calmerge.methods import METHODS

FOLDER = Path(__file__).parents[1] / "docs" / "methods"


def test_the_pages_are_up_to_date() -> None:
    """If not: python -m calmerge._pages docs/methods"""
    committed = {file.name: file.read_text() for file in FOLDER.glob("*.md")}
    made = pages()
    assert sorted(committed) == sorted(made)
    assert [name for name in made if committed[name] != made[name]] == []


def test_every_method_has_a_page_and_a_row() -> None:
    index = (FOLDER / "README.md").read_text()
    for name in METHODS:
        assert f"[`{name}`]({name}.md)" in index
        assert (FOLDER / f"{name}.md").read_text().count(f"# `{name}`") == 1
