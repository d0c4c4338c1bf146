"""Recipes: the calls they become, and every mistake with its line."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from calmerge import Merge, TaskVectors, UsageError, Weights, task_vectors
from calmerge._pipe import PROVIDED, gives_task_vectors, takes_merged
from calmerge._run import Run
from calmerge._signature import KeepFraction, Seed, options_of
from calmerge._yaml import parse
from calmerge.methods import METHODS
from calmerge.recipe import Recipe, build, load_recipe, recipe_from_dict


def trim(tvs: TaskVectors, *, keep: KeepFraction = 0.2) -> TaskVectors:
    return tvs.transform(lambda tau, site: tau * keep)


def shake(tvs: TaskVectors, *, seed: Seed = 0) -> TaskVectors:
    return tvs.transform(lambda tau, site: tau + seed)


def total(tvs: TaskVectors, *, scale: float = 1.0, combine: Literal["sum", "mean"] = "sum") -> Weights:
    return tvs.reduce(lambda tau, site: scale * (tau.sum(0) if combine == "sum" else tau.mean(0)))


def around(tvs: TaskVectors, *, inner: Merge = total) -> Weights:
    return inner(tvs)


def rescale(merged: Weights, tvs: TaskVectors, *, beta: float = 1.0) -> Weights:
    return tvs.reduce(lambda tau, m, site: m + beta * tau.sum(0), merged)


def learn(tvs: TaskVectors, *, tasks: Any, masks: Path | None = None, run: Run | None = None) -> Weights:
    tasks.append((run, masks))
    return total(tvs)


STUBS = {f.__name__: f for f in (trim, shake, total, around, rescale, learn)}
TVS = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([3.0])}})
HEAD = {"base": "./base", "experts": {"a": "./a", "b": "./b"}}
YAML = "base: ./base\nexperts: {a: ./a, b: ./b}\nmerge:\n"


def result(merge: Any, **more: Any) -> float:
    recipe = recipe_from_dict({**HEAD, "merge": merge, **more}, methods=STUBS)
    return build(recipe, methods=STUBS)(TVS, None, None)["w"].item()


def mistakes(text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError) as e:
        load_recipe(tmp_path / "recipe.yaml", methods=STUBS)
    return [line.strip() for line in str(e.value).splitlines() if not line.endswith("mistakes:")]


@pytest.mark.parametrize(
    ("merge", "value"),
    [
        ("total", 4.0),
        (["total"], 4.0),
        ({"total": {"scale": 0.5}}, 2.0),
        ({"total": None}, 4.0),
        ([{"trim": {"keep": 0.5}}, {"total": {"combine": "mean"}}], 1.0),
        (["total", {"rescale": {"beta": 0.5}}], 6.0),
        ([{"trim": {"keep": 0.5}}, "total", "rescale"], 6.0),  # the second argument is the original task vectors
        ("around", 4.0),
        ({"around": {"inner": "total"}}, 4.0),
        ({"around": {"inner": {"total": {"scale": 2}}}}, 8.0),
        ({"around": {"inner": [{"trim": {"keep": 0.5}}, "total", "rescale"]}}, 6.0),
        ({"around": {"inner": {"around": {"inner": {"total": {"scale": 2}}}}}}, 8.0),
    ],
)
def test_a_pipe_is_a_chain_of_calls(merge: Any, value: float) -> None:
    assert result(merge) == pytest.approx(value)


def test_the_seed_reaches_steps_that_name_none() -> None:
    assert result(["shake", "total"], seed=5) == 14.0
    assert result([{"shake": {"seed": 1}}, "total"], seed=5) == 6.0
    assert result(["shake", "total"]) == 4.0
    assert result({"around": {"inner": ["shake", "total"]}}, seed=5) == 14.0


def test_data_and_run_reach_the_steps_that_take_them(tmp_path) -> None:
    data = {
        **HEAD,
        "merge": {"around": {"inner": {"learn": {"masks": "masks"}}}},
        "model": {"kind": "image-classifier"},
    }
    data["tasks"] = {name: {"classes": ["x", "y"], "pool": f"{name}.csv"} for name in "ab"}
    recipe = recipe_from_dict(data, folder=tmp_path, methods=STUBS)
    seen: list[Any] = []
    run = Run()
    build(recipe, methods=STUBS)(TVS, seen, run)  # type: ignore[arg-type]
    assert seen == [(run, tmp_path / "masks")]
    assert recipe.needs_tasks(STUBS)
    with pytest.raises(UsageError, match="learns from data, but no tasks were handed in"):
        build(recipe, methods=STUBS)(TVS, None, None)


def test_paths_start_at_the_recipe(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(
        "base: org/vit@main\nexperts: {a: ./a, b: ~/b, c: org/vit-c}\nmerge: total\n"
        "out: {path: merged, dtype: float16}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml", methods=STUBS)
    assert recipe.base == "org/vit@main"
    assert recipe.experts == {"a": tmp_path / "a", "b": Path.home() / "b", "c": "org/vit-c"}
    assert (recipe.out.path, recipe.out.dtype, recipe.out.shard) == (tmp_path / "merged", "float16", None)
    assert recipe.lines == {
        "base": "r.yaml:1",
        "experts.a": "r.yaml:2",
        "experts.b": "r.yaml:2",
        "experts.c": "r.yaml:2",
    }


def test_out_may_be_a_path_alone() -> None:
    recipe = recipe_from_dict({**HEAD, "merge": "total", "out": "merged"}, folder="/r", methods=STUBS)
    assert recipe.out.path == Path("/r/merged")


def test_round_trip(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(YAML + "  - shake\n  - total: {scale: 1e-4}\nseed: 3\nexclude: ['*no*']\n")
    recipe = load_recipe(tmp_path / "r.yaml", methods=STUBS)
    again = recipe_from_dict(recipe.to_dict(), folder=tmp_path, methods=STUBS)
    assert again.to_dict() == recipe.to_dict() == parse(recipe.to_yaml(), "r.yaml").plain()
    assert [s.to_data() for s in again.merge] == ["shake", {"total": {"scale": 1e-4}}]
    assert (again.base, again.experts, again.seed, again.exclude) == (recipe.base, recipe.experts, 3, ("*no*",))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("  tota", "recipe.yaml:3: no method is called 'tota'. Did you mean 'total'?"),
        ("  - trim: {keep: 20}\n  - total", "recipe.yaml:4: trim.keep must lie in (0, 1], got 20. For 20 % write 0.2."),
        ("  - trim:\n      kep: 0.2\n  - total", "recipe.yaml:5: trim has no option 'kep'. Did you mean 'keep'?"),
        (
            "  - trim",
            "recipe.yaml:4: trim gives one vector for each task and nothing merges them. Add a method that does, "
            "such as 'task_arithmetic' or 'average', as the last step.",
        ),
        (
            "  - total\n  - trim",
            "recipe.yaml:5: trim takes task vectors, but total before it has already merged them. Put trim before "
            "total, or leave one out.",
        ),
        (
            "  - rescale",
            "recipe.yaml:4: rescale works on a finished merge; put a method that merges, such as ties, before it.",
        ),
        (
            "  - around:\n      inner: [trim]",
            "recipe.yaml:5: trim gives one vector for each task and nothing merges them. Add a method that does, "
            "such as 'task_arithmetic' or 'average', as the last step.",
        ),
        ("  around: {inner: tota}", "recipe.yaml:4: no method is called 'tota'. Did you mean 'total'?"),
        ("  around: {inner: 3}", "recipe.yaml:4: around.inner must be a method, got 3."),
        (
            "  around:\n    inner:\n      total: {scal: 1}",
            "recipe.yaml:6: total has no option 'scal'. Did you mean 'scale'?",
        ),
        (
            "  - learn",
            "recipe.yaml:4: learn learns from unlabelled data; add 'tasks:' to the recipe, or use a method that needs "
            "none, such as ties.",
        ),
        (
            "  - total: 0.3",
            "recipe.yaml:4: the options of total must be a mapping, as in {total: {option: value}}, got 0.3.",
        ),
        (
            "  - trim: {keep: 0.2}\n    total: {}",
            "recipe.yaml:4: a step is one method, but this entry has 2 keys (trim, total). Give each method its own "
            "'- ', and its options one level deeper.",
        ),
        ("  - 3", "recipe.yaml:4: a method's name was expected, got 3."),
        ("  []", "recipe.yaml:3: no method is given. Write a name, such as 'average'."),
        ("  total\nseed: -1", "recipe.yaml:5: recipe.seed must lie in [0, 2^63 - 1], got -1."),
        (
            "  total\nexperts: {}",
            "recipe.yaml:5: the key 'experts' was given before, on line 2. Remove one of the two.",
        ),
        ("  total\nout: {pth: x}", "recipe.yaml:5: out has no key 'pth'. Did you mean 'path'?"),
        (
            "  total\nout: {dtype: fp16}",
            "recipe.yaml:5: out.dtype must be 'float32' or 'float16' or 'bfloat16' or null, got 'fp16'. "
            "Known: bfloat16, float16, float32.",
        ),
        ("  total\nout: 3", "recipe.yaml:5: out.path must be a path or null, got 3."),
        ("  total\ndytpe: float16", "recipe.yaml:5: recipe has no key 'dytpe'. Known: base, chat_template, exclude"),
        (
            "  total\nkeep: 0.2",
            "recipe.yaml:5: 'keep' is an option of trim; write it there, as in merge: [{trim: {keep: 0.2}}].",
        ),
        ("  total\nexclude: embed", "recipe.yaml:5: recipe.exclude must be a list of text, got 'embed'."),
        ("  total\ntasks: []", "recipe.yaml:5: 'tasks' must be a mapping from each task's name to its data."),
        ("  total\ntasks: {suite: txet}", "recipe.yaml:5: no suite is called 'txet'"),
    ],
)
def test_each_mistake_names_its_line(lines: str, says: str, tmp_path) -> None:
    found = mistakes(YAML + lines + "\n", tmp_path)
    assert any(line.startswith(says) for line in found), found


def test_all_mistakes_are_reported_together(tmp_path) -> None:
    text = "bse: ./b\nexperts: {}\nmerge: [{trim: {keep: 20}}, {tota: {}}]\nseed: one\n"
    assert mistakes(text, tmp_path) == [
        "recipe.yaml:1: recipe has no key 'bse'. Did you mean 'base'?",
        "recipe.yaml:4: recipe.seed must be a whole number, got 'one'.",
        "recipe.yaml:1: recipe needs the key 'base': what the experts were fine-tuned from.",
        "recipe.yaml:2: 'experts' is empty; a merge needs at least one.",
        "recipe.yaml:3: trim.keep must lie in (0, 1], got 20. For 20 % write 0.2.",
        "recipe.yaml:3: no method is called 'tota'. Did you mean 'total'?",
    ]


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ("[./a, ./b]", "recipe.yaml:2: recipe.experts must be a mapping, got ['./a', './b']."),
        (
            "{a: [./a]}",
            "recipe.yaml:2: expert 'a' must be text (a path or a hub id), {model: PATH, layers: [0, 8]}, or a merge "
            "with its own 'experts' and 'merge'; got ['./a'].",
        ),
        ("", "recipe.yaml:2: recipe.experts must be a mapping, got None."),
    ],
)
def test_experts_of_another_form(experts: str, says: str, tmp_path) -> None:
    assert says in mistakes(f"base: ./b\nexperts: {experts}\nmerge: total\n", tmp_path)


def test_an_empty_recipe_says_what_it_needs(tmp_path) -> None:
    assert mistakes("seed: 1\n", tmp_path) == [
        "recipe.yaml:1: recipe needs the key 'merge'.",
        "recipe.yaml:1: recipe needs the key 'base': what the experts were fine-tuned from.",
        "recipe.yaml:1: recipe needs the key 'experts', as in {cars: ./cars, dtd: ./dtd}.",
    ]
    assert mistakes("- total\n", tmp_path) == [
        "recipe.yaml:1: a recipe is a mapping with the keys base, experts and merge."
    ]


TASKS = """  learn
model: {kind: sequence-classifier}
tasks:
  a: {classes: [x, y], pool: a/pool.csv, test: a/test.csv}
  b: {classes: [x, y], pool: b/pool.csv}
"""


def test_tasks_written_in_the_recipe_become_a_suite(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(YAML + TASKS)
    suite = load_recipe(tmp_path / "recipe.yaml", methods=STUBS).tasks
    assert suite is not None
    assert (suite.model.kind, suite.base, suite.transductive) == ("sequence-classifier", tmp_path / "base", False)
    assert suite.experts == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert (suite.tasks["a"].pool, suite.tasks["b"].test) == (tmp_path / "a/pool.csv", None)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  b: {", "  c: {", "recipe.yaml:6: expert 'b' has no task of that name. Known: a, c."),
        ("  b: {", "  c: {", "recipe.yaml:8: task 'c' has no expert. Known: a, b."),
        ("pool: b/pool.csv", "poll: b/pool.csv", "recipe.yaml:8: task 'b' has no key 'poll'. Did you mean 'pool'?"),
        ("pool: b/pool.csv", "expert: b", "recipe.yaml:8: task 'b'.expert cannot be set here: calmerge fills it in."),
        ("pool: a/pool.csv", "pool: a/test.csv", "recipe.yaml:7: task 'a' has its test split as pool"),
        (
            "model: {kind: sequence-classifier}\n",
            "",
            "data need to know the model: add 'model: {kind: sequence-classifier}'",
        ),
        ("kind: seq", "kind: sq", "recipe.yaml:5: model.kind must be 'sequence-classifier' or"),
    ],
)
def test_mistakes_in_tasks_name_their_line(old: str, new: str, says: str, tmp_path) -> None:
    assert old in TASKS
    found = mistakes(YAML + TASKS.replace(old, new), tmp_path)
    assert any(says in line for line in found), found


SUITE = """suite: pets
version: 1
model: {kind: image-classifier}
base: ./vit
heads: ["*top*"]
tasks:
  cats: {expert: ./cats, classes: [x, y], pool: c/pool, test: c/test}
  dogs: {expert: ./dogs, classes: [x, y], pool: d/pool, test: d/test}
"""


def test_a_suite_brings_base_and_experts(tmp_path) -> None:
    (tmp_path / "pets.yaml").write_text(SUITE)
    (tmp_path / "r.yaml").write_text("merge: learn\ntasks: {suite: pets.yaml}\n")
    recipe = load_recipe(tmp_path / "r.yaml", methods=STUBS)
    assert (recipe.base, recipe.heads) == (tmp_path / "vit", ("*top*",))
    assert recipe.experts == {"cats": tmp_path / "cats", "dogs": tmp_path / "dogs"}


def test_a_recipe_may_merge_some_experts_of_a_suite(tmp_path) -> None:
    (tmp_path / "pets.yaml").write_text(SUITE)
    (tmp_path / "r.yaml").write_text("experts: {dogs: ./mine}\nmerge: learn\ntasks: {suite: pets.yaml}\n")
    suite = load_recipe(tmp_path / "r.yaml", methods=STUBS).tasks
    assert suite is not None
    assert suite.experts == {"dogs": tmp_path / "mine"}
    (tmp_path / "r.yaml").write_text("experts: {dgs: ./mine}\nmerge: learn\ntasks: {suite: pets.yaml}\n")
    with pytest.raises(UsageError, match=r"r\.yaml:3: expert 'dgs' has no task of that name\. Did you mean 'dogs'\?"):
        load_recipe(tmp_path / "r.yaml", methods=STUBS)


def test_mistakes_of_a_suite_are_reported_with_its_own_lines(tmp_path) -> None:
    (tmp_path / "pets.yaml").write_text(SUITE.replace("version: 1", "version: x"))
    assert "pets.yaml:2: suite.version must be a whole number, got 'x'." in "\n".join(
        mistakes("merge: learn\ntasks: {suite: pets.yaml}\n", tmp_path)
    )


@pytest.mark.parametrize(
    "merge",
    [
        "average",
        [{"drop_and_rescale": {"rate": 0.0}}, {"ties": {"keep": 1.0}}],
        {"dare": {"rate": 0.0, "inner": {"ties": {"keep": 1.0}}}},
    ],
)
def test_the_real_methods_are_reached(merge: Any) -> None:
    recipe = recipe_from_dict({**HEAD, "merge": merge})
    assert build(recipe)(TVS, None, None)["w"].item() == 2.0
    assert not recipe.needs_tasks()


def some(kind: str) -> Any:
    return ["a"] if kind == "list of text" else [1.0] if "list" in kind else {} if "mapping" in kind else 0.5


def test_every_method_of_the_table_can_stand_in_a_recipe() -> None:
    tasks = {name: {"classes": ["x", "y"], "pool": f"{name}.csv"} for name in "ab"}
    for name in METHODS:
        needed = {o.name: some(o.type) for o in options_of(METHODS[name]).values() if o.required}
        step = {name: {k: v for k, v in needed.items() if k not in PROVIDED}}
        before = ["average"] if takes_merged(METHODS[name]) else []
        after = ["average"] if gives_task_vectors(METHODS[name]) else []
        merge = [*before, step, *after]
        data = {**HEAD, "merge": merge, "tasks": tasks, "model": {"kind": "image-classifier"}}
        assert isinstance(recipe_from_dict(data), Recipe)
