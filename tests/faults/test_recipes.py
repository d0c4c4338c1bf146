"""Recipes made at random, or damaged: each is a Recipe, or one UsageError that names the file."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from calmerge import UsageError
from calmerge._yaml import Node, dump, parse
from calmerge.methods import METHODS
from calmerge.recipe import Recipe, load_recipe, recipe_from_dict

LINES = """\
base: ./base
experts: {a: ./a, b: org/b@main}
seed: 3
exclude: ['*embed*', "head.?"]
merge:
  - drop_and_rescale: {rate: 0.9}
  - ties:
      keep: 0.2
      combine: sum
  - lines: {beta: 0.5}
out: {path: merged, dtype: bfloat16, shard: 5GB}
"""
DATA: dict[str, Any] = {
    "base": "./base",
    "experts": {"a": "./a", "b": "./b"},
    "merge": [{"ties": {"keep": 0.2}}, {"lines": {"beta": 0.5}}],
    "model": {"kind": "sequence-classifier", "max_tokens": 16},
    "tasks": {n: {"classes": ["x", "y"], "pool": "p.csv", "test": "t.csv"} for n in "ab"},
    "heads": ["cls.*"],
    "transductive": False,
    "out": {"path": "merged"},
}
SETTINGS = settings(
    deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(text: str, folder: Path) -> Recipe | None:
    (folder / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = load_recipe(folder / "r.yaml")
    except UsageError as e:
        return names_the_place(e, "r.yaml")
    assert isinstance(found, Recipe)
    assert recipe_from_dict(found.to_dict(), folder=folder).to_dict() == found.to_dict()
    return found


def names_the_place(error: UsageError, file: str) -> None:
    assert file in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def test_the_recipes_are_sound_before_they_are_damaged(folder: Path) -> None:
    assert check(LINES, folder) is not None
    assert check(dump(DATA), folder) is not None


@SETTINGS
@given(st.text(max_size=60))
@example("\ud800")
@example("%YAML 3.0\n---\na: 1")
@example("a: !<tag:yaml.org,2002:int> 1_0")
@example("? \n: \n? ")
def test_any_text(folder: Path, text: str) -> None:
    check(text, folder)


@SETTINGS
@given(
    st.lists(
        st.sampled_from([*"abx01-:,.&*!?|>'\"{}[]#%@ \t\n", "\n  ", ": ", "- ", "<<", "!!", "\u2028"]), max_size=40
    )
)
def test_any_text_of_the_signs_of_yaml(folder: Path, signs: list[str]) -> None:
    text = "".join(signs)
    check(text, folder)
    try:
        assert isinstance(parse(text, "r.yaml"), Node)
    except UsageError as e:
        names_the_place(e, "r.yaml")


@SETTINGS
@given(st.integers(0, 10**9))
def test_a_recipe_with_damaged_lines(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    text = LINES
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        lines = text.splitlines(keepends=True)
        match rng.randrange(5):
            case 0:
                text = text[:at] + text[at + rng.randint(1, 6) :]
            case 1:
                text = text[:at] + rng.choice([*"abz019-:,.&*!?|>'\"{}[]#\n \t\x00", "  ", ": ", "99999"]) + text[at:]
            case 2:
                text = "".join(line for line in lines if line != rng.choice(lines))
            case 3:
                text += rng.choice(lines)
            case _:
                rng.shuffle(lines)
                text = "".join(lines)
        text = text or "a"
    check(text, folder)


KEYS = st.sampled_from(["a", "ties", "keep", "inner", "suite", "kind", "rate", "path", "scale", "seed", "t", "?"])
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(-2, 2)
    | st.sampled_from([float("inf"), float("nan"), 10**400, 1e-320, "ties", "a", "*", "[", "./a", "\0", "x" * 300, ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "ties", "keep", "inner", "suite", "kind", "rate", "path", "?"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 1000), ANYTHING), min_size=1, max_size=3))
@example([(27, True)])
def test_a_recipe_with_anything_in_any_place(folder: Path, changes: list[tuple[int, Any]]) -> None:
    data = copy.deepcopy(DATA)
    for number, value in changes:
        known = places(data)[1:]
        if not known:
            break
        *path, last = known[number % len(known)]
        inner = data
        for key in path:
            inner = inner[key]
        inner[last] = value
    try:
        assert isinstance(recipe_from_dict(data, folder=folder), Recipe)
    except UsageError as e:
        names_the_place(e, "recipe")
    check(dump(data), folder)


@SETTINGS
@given(
    st.sampled_from(sorted(METHODS)),
    st.dictionaries(st.sampled_from(["keep", "inner", "scale", "seed", "t"]), ANYTHING),
)
def test_any_method_with_any_options(folder: Path, method: str, options: dict[str, Any]) -> None:
    check(dump({**DATA, "merge": [{method: options}]}), folder)
