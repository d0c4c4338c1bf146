"""What the documents show is true: recipes and suites are read, tables are complete, commands exist."""

import dataclasses
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calmerge._explain import explanation
from calmerge._signature import options_of
from calmerge._yaml import parse
from calmerge.cli import app
from calmerge.methods import METHODS
from calmerge.recipe import _keys_of_a_recipe, load_recipe
from calmerge.suites.finetune import Finetune
from calmerge.suites.suite import Model, SuiteTask, _keys_of_a_suite, load_suite

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def keys_in_tables(page: str) -> set[str]:
    first = re.findall(r"^\| (`.*?`) \|", (DOCS / page).read_text(), flags=re.MULTILINE)
    return {key for cell in first for key in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("text", [*blocks("recipes.md", "yaml"), *blocks("lora.md", "yaml")])
def test_the_recipes_shown_are_sound(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.merge or recipe.stack


@pytest.mark.parametrize("text", blocks("suites.md", "yaml"))
def test_the_suite_shown_is_sound(text: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    assert load_suite(tmp_path / "suite.yaml").tasks


def test_every_key_is_described() -> None:
    assert set(options_of(_keys_of_a_recipe)) <= keys_in_tables("recipes.md")
    described = keys_in_tables("suites.md")
    assert set(options_of(_keys_of_a_suite)) <= described
    for kind in (Model, SuiteTask, Finetune):
        assert {f.name for f in dataclasses.fields(kind)} - {"name"} <= described, kind


def test_every_verb_is_described() -> None:
    verbs = re.findall(r"^\| `([\w-]+)` \| `calmerge", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)
    assert verbs == [c.name or c.callback.__name__ for c in app.registered_commands]


@pytest.mark.parametrize("page", ["recipes.md", "suites.md", "cli.md", "lora.md"])
def test_commands_name_options_that_exist(page: str) -> None:
    for verb, rest in re.findall(r"calmerge ([\w-]+)([^\n`]*)", (DOCS / page).read_text()):
        if verb.isupper() or not rest.count("--"):
            continue
        shown = CliRunner().invoke(app, [verb, "--help"]).stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, (verb, option)


def test_explained_recipes_are_those_of_the_table() -> None:
    for name in METHODS:
        assert name in str(parse(explanation(name).recipe, "r.yaml").plain())
