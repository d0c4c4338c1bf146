"""What the documents show is true: recipes and suites are read, tables are complete, commands exist."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calmerge._explain import explanation
from calmerge._pipe import walk
from calmerge._recipe_reading import keys_of_a_recipe
from calmerge._signature import options_of
from calmerge._yaml import parse
from calmerge.cli import app
from calmerge.methods import METHODS
from calmerge.recipe import load_recipe
from calmerge.report import results
from calmerge.suites.finetune import Finetune
from calmerge.suites.suite import Model, SuiteTask, _keys_of_a_suite, load_suite

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("README.md"), *DOCS.glob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def keys_in_tables(page: str) -> set[str]:
    first = re.findall(r"^\| (`.*?`) \|", (DOCS / page).read_text(), flags=re.MULTILINE)
    return {key for cell in first for key in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("text", [*blocks("recipes.md", "yaml"), *blocks("lora.md", "yaml")])
def test_the_recipes_shown_are_sound(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.merge or recipe.parts()


@pytest.mark.parametrize("text", blocks("suites.md", "yaml"))
def test_the_suite_shown_is_sound(text: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    assert load_suite(tmp_path / "suite.yaml").tasks


def test_every_key_is_described() -> None:
    assert set(options_of(keys_of_a_recipe)) <= keys_in_tables("recipes.md")
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


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_sound_and_begin_with_their_command(file: Path) -> None:
    recipe = load_recipe(file)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert f"calmerge merge recipes/{file.name} --out " in header[1]
    if "as in the league" in header[0]:
        merge = recipe.to_dict()["merge"]
        (name, options), *_ = (merge[0] if isinstance(merge, list) else merge).items()
        assert options == load_suite(file.stem.split("-")[0]).methods[name]


def test_every_way_to_learn_has_a_recipe() -> None:
    called = {step.name for file in RECIPES for step in walk(load_recipe(file).merge, METHODS)}
    assert {"calm", "calm_joint", "adamerging", "regmean", "prodistill", "searched", "map_front"} <= called


def test_the_tutorial_runs_from_top_to_bottom(
    tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_suite.parent / "base", "base")
    Path("data").mkdir()
    for here, there in {"movies": "colours", "products": "shapes"}.items():
        shutil.copytree(tiny_suite.parent / "experts" / there, f"experts/{here}")
        for split in ("pool", "test"):
            shutil.copy(tiny_suite.parent / f"{there}-{split}.csv", f"data/{here}-{split}.csv")
    names: dict[str, object] = {}
    for language, text in re.findall(r"```(\w+)\n(.*?)```", (DOCS / "tutorial.md").read_text(), flags=re.DOTALL):
        if language == "yaml":
            Path(text.split()[1]).write_text(text)
        elif language == "python":
            exec(text, names)
        else:
            for line in text.splitlines():
                program, *words = shlex.split(line)
                done = CliRunner().invoke(app, words, catch_exceptions=False)
                assert (program, done.exit_code) == ("calmerge", 0), f"{line}: {done.output}"
    rows = results.load("bench-reviews/report.json").rows
    assert [row.method for row in rows] == ["base", "experts", "average", "ties", "tsv_m", "calm"]
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, heading = link.partition("#")
        if "://" in file:
            continue
        there = (page.parent / file) if file else page
        assert there.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, link
