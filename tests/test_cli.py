"""The command line, in process: exit code, message, files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from calmerge import add, emr, load_suite, materialise, open_merged, open_suite
from calmerge._explain import explanation
from calmerge.cli import app
from calmerge.methods import METHODS
from calmerge.recipe import recipe_from_dict
from calmerge.report import results
from calmerge.tasks.serving import serving

VERBS = ["demo", "merge", "eval", "bench", "inspect", "list", "explain", "validate", "verify", "export"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two experts in plain files: their mean is 2."""
    for name, value in {"base": 0.0, "a": 1.0, "b": 3.0}.items():
        (tmp_path / name).mkdir()
        tensors = {"w": torch.full((4, 2), value), "v": torch.ones(3)}
        save_file(
            tensors | ({"head": torch.ones(2, 2)} if name != "base" else {}), tmp_path / name / "model.safetensors"
        )
    path = tmp_path / "recipe.yaml"
    path.write_text("base: ./base\nexperts: {a: ./a, b: ./b}\nmerge: average\nout: merged\n")
    return path


def test_help_begins_with_an_example_and_names_every_verb() -> None:
    shown = call("--help")
    assert shown.exit_code == 0
    assert shown.stdout.split("\n\n")[1].strip() == "Example: calmerge demo"
    assert all(f"  {verb} " in shown.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_begins_with_an_example(verb: str) -> None:
    shown = call(verb, "--help")
    assert shown.exit_code == 0
    assert shown.stdout.split("\n\n")[1].strip().startswith(f"Example: calmerge {verb}")


def test_help_answers_in_half_a_second() -> None:
    """Of processor time, which other work on the machine does not change."""
    times = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "calmerge.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert b"Example" in done.stdout
    assert 0 < min(times) < 0.5


def test_help_does_not_import_torch() -> None:
    code = "import sys, calmerge.cli; sys.exit(any(m in sys.modules for m in ('torch', 'rich', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_verb_shows_the_help_and_is_wrong_usage() -> None:
    assert call().exit_code == 2


def test_version() -> None:
    assert call("--version").stdout.startswith("calmerge 0.")


def test_merge_writes_the_folder(recipe: Path) -> None:
    done = call("merge", recipe)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "merged 2 tensors into" in done.stdout
    folder = recipe.parent / "merged"
    assert load_file(folder / "model.safetensors")["w"].eq(2).all()
    assert {"README.md", "report.json", "report.html", "calmerge.json", "heads"} <= set(os.listdir(folder))
    report = results.load(folder / "report.json")
    assert (report.rows[0].method, report.rows[0].data) == ("average", "none")
    assert report.recipe == {"base": "./base", "experts": {"a": "./a", "b": "./b"}, "merge": "average", "out": "merged"}
    assert sorted(os.listdir(recipe.parent)) == ["a", "b", "base", "merged", "recipe.yaml"]


def test_merge_prints_the_manifest_as_json(recipe: Path) -> None:
    done = call("merge", recipe, "--out", recipe.parent / "other", "--json")
    manifest = json.loads(done.stdout)
    assert (manifest["merged"], manifest["tasks"]) == (2, ["a", "b"])
    assert (recipe.parent / "other" / "model.safetensors").is_file()


def test_dry_run_prints_the_plan_and_writes_nothing(recipe: Path) -> None:
    done = call("merge", recipe, "--dry-run")
    assert done.exit_code == 0
    assert "average()" in done.stdout
    assert "2 tensors, 11 entries" in done.stdout
    assert "heads     a 1, b 1" in done.stdout
    assert not (recipe.parent / "merged").exists()
    plan = json.loads(call("merge", recipe, "--dry-run", "--json", "--out", "x").stdout)
    assert (plan["merged"], plan["writes"], plan["out"], plan["heads"]) == (2, 44 + 2 * 16, "x", {"a": 1, "b": 1})
    assert (plan["kind"], plan["passes"], plan["inputs"], plan["reads"]) == ("A", 1, 3 * 44 + 2 * 16, 3 * 44)


def test_dtype_and_shards_of_the_recipe_are_kept(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("out: merged", "out: {path: merged, dtype: bfloat16, shard: 20B}"))
    assert call("merge", recipe).exit_code == 0
    files = sorted((recipe.parent / "merged").glob("*.safetensors"))
    assert len(files) == 2
    assert {t.dtype for f in files for t in load_file(f).values()} == {torch.bfloat16}
    assert json.loads(call("merge", recipe, "--dry-run", "--json").stdout)["writes"] == 22 + 2 * 16


def test_the_options_of_out_may_stand_on_the_command_line(recipe: Path) -> None:
    words = ["--dtype", "bfloat16", "--shard", "20B", "--max-memory", "8GB"]
    assert call("merge", recipe, *words).exit_code == 0
    files = sorted((recipe.parent / "merged").glob("*.safetensors"))
    assert len(files) == 2
    assert {t.dtype for f in files for t in load_file(f).values()} == {torch.bfloat16}
    manifest = json.loads((recipe.parent / "merged" / "calmerge.json").read_text())
    assert manifest["recipe"]["out"] == {"path": "merged", "dtype": "bfloat16", "shard": "20B", "max_memory": "8GB"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dtype", "bf16"], "got 'bf16'. Did you mean 'bfloat16'?"),
        (["--shard", "big"], "out.shard must be a size like 5GB or 500MB, got 'big'"),
        (["--max-memory", "0GB"], "out.max_memory must be a size like 5GB or 500MB, got '0GB'"),
        (["--max-memory", "1MB"], "max_memory: this merge needs "),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(words: list[str], says: str, recipe: Path) -> None:
    for dry in ([], ["--dry-run"]):
        done = call("merge", recipe, *words, *dry)
        assert done.exit_code == 2
        assert says in done.stderr
    assert not (recipe.parent / "merged").exists()


def test_a_size_in_a_recipe_that_is_none_is_found_with_its_line(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("out: merged", "out: {path: merged, shard: big}"))
    done = call("validate", recipe)
    assert done.exit_code == 2
    assert "recipe.yaml:4: out.shard must be a size like 5GB or 500MB, got 'big'." in done.stderr


def test_wrong_usage_is_exit_code_2_with_every_mistake_once(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("average", "{tise: {keep: 20}}").replace("out:", "ot:"))
    done = call("merge", recipe)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: 2 mistakes:",
        "  recipe.yaml:4: recipe has no key 'ot'. Did you mean 'out'?",
        "  recipe.yaml:3: no method is called 'tise'. Did you mean 'ties' or 'fisher'?",
    ]


def test_a_failure_is_exit_code_1_and_leaves_nothing(recipe: Path) -> None:
    save_file({"w": torch.full((4, 2), torch.nan), "v": torch.ones(3)}, recipe.parent / "b" / "model.safetensors")
    done = call("merge", recipe)
    assert done.exit_code == 1
    assert "expert 'b': tensor 'w' has 8 entries that are NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(recipe.parent)) == ["a", "b", "base", "recipe.yaml"]


def test_missing_checkpoints_are_named_together(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("./a", "./x").replace("./base", "./y"))
    done = call("merge", recipe)
    assert done.exit_code == 1
    assert f"recipe.yaml:1: the base: no checkpoint at '{recipe.parent / 'y'}'" in done.stderr
    assert f"recipe.yaml:2: expert 'a': no checkpoint at '{recipe.parent / 'x'}'" in done.stderr


def test_a_taken_output_is_found_before_any_work(recipe: Path) -> None:
    (recipe.parent / "merged").mkdir()
    (recipe.parent / "merged" / "mine.txt").write_text("keep me")
    done = call("merge", recipe)
    assert done.exit_code == 1
    assert "'merged' is there already; nothing was done" in done.stderr
    assert os.listdir(recipe.parent / "merged") == ["mine.txt"]


def test_resume_goes_on_from_a_stopped_merge(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import calmerge._save

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    recipe.write_text(recipe.read_text().replace("out: merged", "out: {path: merged, shard: 20B}"))
    for words, says in {
        ("-q",): "warning: removed what a stopped run had left",
        ("--resume",): "note: going on",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(calmerge._save, "_write_head", stopped)
            done = call("merge", recipe)
        assert done.exit_code == 130
        assert "the same command goes on from there (merge, extract-lora: with --resume)" in done.stderr
        assert not (recipe.parent / "merged").exists()
        done = call("merge", recipe, *words, "--out", recipe.parent / "merged")
        assert (done.exit_code, says in done.stderr) == (0, True), done.stderr
        assert sorted(os.listdir(recipe.parent)) == ["a", "b", "base", "merged", "recipe.yaml"]
        journal = recipe.parent / ".merged.journal"
        journal.write_text("")  # of a run that was killed when its folder had just got its name
        again = call("merge", recipe, "--resume", "--json")
        assert again.exit_code == 0
        assert "'merged' was finished before" in again.stderr
        assert not journal.exists()
        shutil.rmtree(recipe.parent / "merged")


def test_a_recipe_without_out_needs_the_option(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("out: merged\n", ""))
    done = call("merge", recipe)
    assert done.exit_code == 2
    assert "recipe.yaml: no 'out' in the recipe, and no folder was given." in done.stderr


def test_debug_shows_the_traceback(recipe: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        call("--debug", "merge", recipe.parent / "none.yaml")


def test_a_missing_recipe_is_wrong_usage(tmp_path: Path) -> None:
    done = call("merge", tmp_path / "recipe.yaml")
    assert done.exit_code == 2
    assert "no such file" in done.stderr


def test_validate(recipe: Path) -> None:
    shown = call("validate", recipe).stdout
    assert shown.startswith("recipe.yaml is fine: a, b.\n")
    assert "reads     164 bytes of base and experts, once: 132 bytes" in shown
    save_file({"w": torch.ones(2, 4), "v": torch.ones(3)}, recipe.parent / "b" / "model.safetensors")
    done = call("validate", recipe)
    assert done.exit_code == 1
    assert "expert 'b'" in done.stderr
    assert "shape" in done.stderr


def test_validate_a_suite(tiny_suite: Path, tmp_path: Path) -> None:
    assert "is fine: colours, shapes, sizes." in call("validate", tiny_suite).stdout
    (tmp_path / "lone.yaml").write_text(tiny_suite.read_text())
    done = call("validate", tmp_path / "lone.yaml")
    assert done.exit_code == 1
    assert "the base is missing" in done.stderr


def test_inspect_reads_recipes_suites_and_folders(recipe: Path, tiny_suite: Path) -> None:
    folder = recipe.parent
    shown = call("inspect", recipe).stdout
    assert "moved by no expert: v" in shown
    assert "head of 'a': head (2, 2)" in shown
    found = json.loads(call("inspect", folder / "base", folder / "a", f"second={folder / 'b'}", "--json").stdout)
    assert found["tasks"] == ["a", "second"]
    assert found["cosines"][0][1] == pytest.approx(1)
    assert found["tensor_norms"]["v"] == [0.0, 0.0]
    assert call("inspect", tiny_suite).exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["base"], "'base' is no recipe and no suite; a base needs its experts behind it"),
        (["base", "x/a", "y/a"], "two experts are called 'a'; name them, as in a2=y/a."),
    ],
)
def test_inspect_wrongly_used(words: list[str], says: str) -> None:
    done = call("inspect", *words)
    assert done.exit_code == 2
    assert says in done.stderr


def test_list_has_one_line_for_each_method() -> None:
    shown = call("list").stdout
    assert all(name in shown for name in METHODS)
    rows = json.loads(call("list", "--json").stdout)
    assert sorted(row["method"] for row in rows) == sorted(METHODS)
    assert {row["data"] for row in rows} == {"none", "unlabelled"}


def test_list_fits_into_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calmerge._show.WIDTH", 100)
    assert max(map(len, call("list").stdout.splitlines())) <= 110
    table = [line for line in call("list").stdout.splitlines() if line.startswith("ties ")]
    assert table[0].split()[:6] == ["ties", "weights", "2", "C", "NeurIPS", "2023"]
    assert len(table[0]) <= 100


@pytest.mark.parametrize("method", METHODS)
def test_explain_every_method(method: str) -> None:
    found = json.loads(call("explain", method, "--json").stdout)
    assert found["summary"]
    assert found["source"] or method in ("trim", "drop_and_rescale")
    assert [o["name"] for o in found["options"] if not o["meaning"] and "Python" not in o["type"]] == []
    assert call("explain", method).exit_code == 0


def test_explain_shows_formula_options_source_and_recipe() -> None:
    shown = call("explain", "ties").stdout
    for part in [
        "reads the inputs 2 times; memory class C",
        ">>> ties(",
        "s = sign(sum_t tau_hat_t)",
        "(0, 1]",
        "0.2",
        "'mean' | 'sum' | 'max'",
        "NeurIPS 2023",
        "- ties:",
    ]:
        assert part in shown


@pytest.mark.parametrize("method", METHODS)
def test_the_recipes_of_explain_are_sound(method: str, monkeypatch, tmp_path, tiny_suite: Path) -> None:
    from calmerge._yaml import parse

    data = parse(explanation(method).recipe, "r.yaml").plain()
    if "tasks" in data:
        data["tasks"] = {"suite": str(tiny_suite)}
    recipe_from_dict(data)


def test_explain_a_recipe_shows_every_parameter_with_its_origin(recipe: Path) -> None:
    pipe = "[{drop_and_rescale: {rate: 0.9}}, {dare: {inner: [{trim: {keep: 0.3}}, average]}}]\nseed: 4"
    recipe.write_text(recipe.read_text().replace("average", pipe))
    rows = json.loads(call("explain", "--recipe", recipe, "--json").stdout)
    found = {(row["step"], row["option"]): (row["value"], row["origin"]) for row in rows}
    assert found["1 drop_and_rescale", "rate"] == (0.9, "recipe")
    assert found["1 drop_and_rescale", "seed"] == (4, "seed")
    assert found["2 dare", "rate"] == (0.9, "default")
    assert found["2 dare > inner 1 trim", "keep"] == (0.3, "recipe")
    shown = call("explain", "--recipe", recipe).stdout
    assert "2 dare > inner 1 trim" in shown
    assert call("explain").exit_code == call("explain", "ties", "--recipe", recipe).exit_code == 2


def test_explain_an_unknown_method() -> None:
    done = call("explain", "tise")
    assert done.exit_code == 2
    assert "no method is called 'tise'. Did you mean 'ties'" in done.stderr


def test_merge_with_data_then_eval_and_export(tiny_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"tasks: {{suite: {tiny_suite}}}\nmerge:\n  - calm: {{steps: 3, sequential: 1}}\nseed: 1\nout: merged\n"
    )
    done = call("merge", tmp_path / "recipe.yaml", "--quiet")
    assert done.exit_code == 0, done.stderr
    report = results.load(tmp_path / "merged" / "report.json")
    assert (report.rows[0].data, report.rows[0].split, report.rows[0].seed) == ("unlabelled pool", "inductive", 1)
    assert report.rows[0].trace is not None
    assert not list(tmp_path.glob(".*"))

    scored = json.loads(call("eval", tmp_path / "merged", "--suite", tiny_suite, "--experts", "--json").stdout)
    assert set(scored["merged"]) == {"colours", "shapes", "sizes"}
    assert 0 <= scored["merged"]["shapes"]["accuracy"] <= scored["experts"]["shapes"]["accuracy"] + 0.2
    shown = call("eval", tmp_path / "merged", "--suite", tiny_suite, "--experts").stdout
    assert "of the experts" in shown

    assert call("export", tmp_path / "merged", "--task", "shapes", "--out", tmp_path / "shapes").exit_code == 0
    assert (tmp_path / "shapes" / "config.json").is_file()
    done = call("export", tmp_path / "merged", "--task", "shape")
    assert done.exit_code == 1
    assert "Did you mean 'shapes'?" in done.stderr


def test_eval_scores_every_task_on_the_model_it_has_for_itself(tiny_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(tiny_suite)
    experts = {task: str(path) for task, path in suite.experts.items()}
    (tmp_path / "r.yaml").write_text(json.dumps({"base": str(suite.base), "experts": experts, "merge": ["emr"]}))
    shown = call("merge", tmp_path / "r.yaml", "--out", tmp_path / "merged", "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert "patch of shapes" in shown.stdout
    scored = json.loads(call("eval", tmp_path / "merged", "--suite", tiny_suite, "--experts", "--json").stdout)
    tvs, tasks = open_suite(suite)
    for task, score in scored["merged"].items():
        own = materialise(add(tvs.base, emr(tvs).for_task(task)).only_names(tvs))
        assert score["accuracy"] == tasks.score(tasks.logits(own, task, "test"), task, "test").accuracy


def test_what_a_fit_has_finished_is_kept_until_the_folder_is_written(
    tiny_suite: Path, tmp_path: Path, monkeypatch
) -> None:
    import calmerge._recipe_run

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"tasks: {{suite: {tiny_suite}}}\nmerge: {{calm: {{steps: 3, sequential: 1}}}}\nout: {{path: merged}}\n"
    )

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calmerge._recipe_run, "save", stopped)
        done = call("merge", recipe, "-q")
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.stderr
    assert any(f.is_file() for f in (tmp_path / ".merged.state").rglob("*"))
    assert not (tmp_path / "merged").exists()
    assert call("merge", recipe, "-q").exit_code == 0
    assert not (tmp_path / ".merged.state").exists()
    assert call("merge", recipe, "-q", "--out", tmp_path / "fresh").exit_code == 0
    first, second = (json.loads((tmp_path / f / "calmerge.json").read_text())["files"] for f in ("merged", "fresh"))
    assert first == second


def test_eval_of_a_folder_that_does_not_fit(tiny_suite: Path, recipe: Path) -> None:
    done = call("eval", recipe.parent / "base", "--suite", tiny_suite)
    assert done.exit_code == 1
    assert "is no merge of the experts of suite 'tiny'" in done.stderr
    done = call("eval", recipe.parent / "base", "--suite", tiny_suite, "--split", "pool")
    assert done.exit_code == 2
    assert "--split must be 'test' or 'validation', got 'pool'." in done.stderr


def test_bench_prints_the_table_and_writes_the_report(tiny_suite: Path, tmp_path: Path) -> None:
    done = call("bench", tiny_suite, "--methods", "average, ties", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "Averaging" in done.stdout
    assert "TIES" in done.stdout
    assert f"report: {tmp_path / 'out' / 'report.html'}" in done.stdout.replace("\n", "")
    report = json.loads(
        call("bench", tiny_suite, "--methods", "average,ties", "--out", tmp_path / "out", "--json").stdout
    )
    assert [row["label"] for row in report["rows"]] == ["Base", "Experts", "Averaging", "TIES"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "tise"], "no method is called 'tise'. Did you mean 'ties'"),
        (["--methods", ","], "--methods names none; write them with commas between"),
        (["--tasks", "shape"], "no task is called 'shape'. Did you mean 'shapes'?"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
    ],
)
def test_bench_wrongly_used(words: list[str], says: str, tiny_suite: Path, tmp_path: Path) -> None:
    done = call("bench", tiny_suite, *words, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_bench_of_an_unknown_suite() -> None:
    done = call("bench", "txt")
    assert done.exit_code == 2
    assert "no suite is called 'txt', and no file is there." in done.stderr


def test_demo_prints_its_report(tiny_suite: Path, tmp_path: Path, monkeypatch) -> None:
    from calmerge.league import run_bench
    from calmerge.suites.suite import load_suite

    def run_demo(*, out, run):
        return run_bench(load_suite(tiny_suite), methods=["average"], out=out, run=run)

    monkeypatch.setitem(sys.modules, "calmerge.suites.demo", SimpleNamespace(run_demo=run_demo))
    done = call("demo", "--out", tmp_path / "demo", "--quiet")
    assert done.exit_code == 0
    assert "Averaging" in done.stdout
    assert (tmp_path / "demo" / "report.html").is_file()


@pytest.mark.parametrize("method", ["twin_merging_routed", "smile", "surgery", "realign_heads"])
def test_routed_and_realigned_merges_are_scored_by_what_they_run(method: str, tiny_suite: Path, tmp_path: Path) -> None:
    options = {"twin_merging_routed": "{steps: 5}", "surgery": "{steps: 5}"}.get(method, "{}")
    (tmp_path / "recipe.yaml").write_text(
        f"tasks: {{suite: {tiny_suite}}}\nmerge: {{{method}: {options}}}\nout: merged\n"
    )
    shown = call("merge", tmp_path / "recipe.yaml", "--quiet")
    assert shown.exit_code == 0, shown.stderr
    routed, realigned = method in ("twin_merging_routed", "smile"), method in ("surgery", "realign_heads")
    assert ("router" in shown.stdout) == routed
    assert ("calmerge export" in shown.stdout) != realigned
    row = results.load(tmp_path / "merged" / "report.json").rows[0]
    assert (row.per_task, row.heads) == (True, "realigned" if realigned else "frozen")
    scored = json.loads(call("eval", tmp_path / "merged", "--suite", tiny_suite, "--json").stdout)
    assert set(scored) == {"merged", *(["routed"] if routed else [])}
    tvs, tasks = open_suite(load_suite(tiny_suite))
    found = serving(open_merged(tmp_path / "merged"), tvs.base.only_names(tvs.specs), tasks)
    for task, score in scored["routed" if routed else "merged"].items():
        assert score["accuracy"] == tasks.score(found(task, "test"), task, "test").accuracy
    table = call("eval", tmp_path / "merged", "--suite", tiny_suite, "--experts").stdout
    assert ("routed" in table) == routed
    assert "of the experts" in table
    done = call("export", tmp_path / "merged", "--task", "shapes", "--out", tmp_path / "shapes")
    assert done.exit_code == (2 if realigned else 0), done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "text", "--methods", "tise"], "no method is called 'tise'. Did you mean 'ties' or 'fisher'?"),
        (["bench", "text", "--out", "taken/out"], "nothing can be written into taken/out: Not a directory."),
        (["demo", "--out", "taken/out"], "nothing can be written into taken/out: Not a directory."),
    ],
)
def test_what_would_fail_after_a_suite_was_made_fails_before(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise AssertionError("a suite is made")

    monkeypatch.setattr("calmerge.suites.prepare.prepare", prepare)
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (2 if "tise" in arguments else 1, f"error: {says}\n")
