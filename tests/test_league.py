"""The league on a tiny suite: complete, resumable, honest about what it saw."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from calmerge import TaskVectors, UsageError, Weights
from calmerge import _entries as league
from calmerge._pipe import walk
from calmerge._signature import options_of
from calmerge.league import run_bench
from calmerge.methods import METHODS
from calmerge.report import results
from calmerge.report.league import standings
from calmerge.suites.suite import load_suite
from calmerge.tasks.hf import open_suite

FEW = ["average", "task_arithmetic_tuned", "lines", "ties", "dare", "adamerging", "calm", "emr"]


@pytest.fixture(scope="module")
def folder(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("league")
    run_bench(load_suite(tiny_suite), methods=FEW, seeds=[0, 1], out=out, command="calmerge bench tiny")
    return out


def test_every_method_has_its_rows(folder: Path) -> None:
    report = results.load(folder / "report.json")
    seeds: dict[str, list[int | None]] = {}
    for row in report.rows:
        assert row.status == "ok", row.error
        assert set(row.scores) == {"colours", "shapes", "sizes"}
        seeds.setdefault(row.label, []).append(row.seed)
    names = ["Averaging", "Task Arithmetic, tuned", "LiNeS", "TIES", "DARE", "AdaMerging", "CALM", "EMR-Merging"]
    assert list(seeds) == ["Base", "Experts", *names]
    assert seeds["TIES"] == [None]
    assert seeds["CALM"] == seeds["DARE"] == [0, 1]


def test_all_entries_run_on_a_suite_and_none_fails(tiny_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(tiny_suite)
    few = {"steps": 2, "mask_steps": 2, "updates": 2, "epochs": 1, "examples": 8, "samples": 10}
    few |= {"batch": 8, "budget": 8}
    names = {step.name for entry in league.ENTRIES.values() for step in walk(entry.steps, METHODS)}
    methods = {name: {k: v for k, v in few.items() if k in options_of(METHODS[name])} for name in names}
    report = run_bench(replace(suite, methods=methods), seeds=[0], out=tmp_path)
    assert {row.label: row.error for row in report.rows if row.error} == {}
    assert {row.label for row in report.methods()} == {entry.label for entry in league.ENTRIES.values()}
    assert all(row.numbers_trained for row in report.rows if row.trace and row.trace.kind == "calm")
    assert all(row.bytes_out and row.seconds is not None for row in report.methods())


def test_a_pipe_is_scored_as_the_merge_it_is(folder: Path) -> None:
    row = next(row for row in results.load(folder / "report.json").rows if row.label == "LiNeS")
    assert row.method == "task_arithmetic + lines"
    assert row.options == {"task_arithmetic": {}, "lines": {}}


def test_models_for_each_task_stand_apart_with_the_bytes_of_all_of_them(folder: Path) -> None:
    lines = {line.label: line for line in standings(results.load(folder / "report.json"))}
    assert [label for label, line in lines.items() if line.block == "a model per task"] == ["EMR-Merging"]
    one, all_, emr = (lines[label].bytes_out for label in ("TIES", "Experts", "EMR-Merging"))
    assert all_ == 3 * one
    assert one < emr < all_  # base, one vector, and a bit per entry and task


def test_numbers_trained_are_counted(folder: Path, tiny_suite: Path) -> None:
    rows = {row.label: row for row in results.load(folder / "report.json").rows}
    tensors = sum(1 for _ in open_suite(load_suite(tiny_suite))[0])
    assert rows["AdaMerging"].numbers_trained == 3 * tensors
    assert rows["CALM"].numbers_trained == rows["CALM"].trace.stages[0].entries
    assert rows["TIES"].numbers_trained is None


def test_rows_say_what_they_saw(folder: Path) -> None:
    rows = {row.label: row for row in results.load(folder / "report.json").rows}
    assert (rows["TIES"].data, rows["TIES"].split) == ("none", "none")
    assert (rows["CALM"].data, rows["CALM"].split) == ("unlabelled pool", "inductive")
    assert rows["Task Arithmetic, tuned"].data == "validation labels"
    assert rows["CALM"].trace is not None
    assert len(rows["CALM"].trace.stages) == 1


def test_what_is_judged_by_labels_says_so(tiny_suite: Path, tmp_path: Path, monkeypatch) -> None:
    searched = {"space": league.SPACE, "inner": "ties", "budget": 2}
    merges = {score: {"searched": {**searched, "score": score}} for score in ("expert_kl", "validation")}
    monkeypatch.setattr(league, "ENTRIES", {score: league.Entry(score, merge) for score, merge in merges.items()})
    report = run_bench(load_suite(tiny_suite), seeds=[0], out=tmp_path)
    data = {row.label: row.data for row in report.methods()}
    assert data == {"expert_kl": "unlabelled pool", "validation": "validation labels"}


def test_finished_rows_are_used_again(folder: Path, tiny_suite: Path) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in (folder / "rows").iterdir()}
    first = results.load(folder / "report.json")
    again = run_bench(load_suite(tiny_suite), methods=FEW, seeds=[0, 1], out=folder)
    assert {f.name: f.stat().st_mtime_ns for f in (folder / "rows").iterdir()} == before
    assert again.rows == first.rows


def test_same_seed_same_scores(folder: Path, tiny_suite: Path, tmp_path: Path) -> None:
    first = {(r.label, r.seed): r.scores for r in results.load(folder / "report.json").rows}
    again = run_bench(load_suite(tiny_suite), methods=["calm", "dare"], seeds=[1], out=tmp_path)
    for row in again.methods():
        assert row.scores == first[row.label, 1]


def files(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in (folder / "rows").iterdir()}


def test_a_method_added_later_runs_alone(tiny_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(tiny_suite)
    run_bench(suite, methods=["ties", "dare"], seeds=[0], out=tmp_path)
    before = files(tmp_path)
    report = run_bench(suite, methods=["average", "ties", "dare"], seeds=[0], out=tmp_path)
    assert {name: when for name, when in files(tmp_path).items() if name in before} == before
    assert [name.rsplit("-", 1)[0] for name in files(tmp_path).keys() - before.keys()] == ["averaging"]
    assert [row.label for row in report.methods()] == ["Averaging", "TIES", "DARE"]


def test_options_of_one_method_leave_the_others_rows_alone(tiny_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(tiny_suite)
    run_bench(suite, methods=["ties", "dare"], seeds=[0], out=tmp_path)
    before = files(tmp_path)
    changed = replace(suite, methods={**suite.methods, "ties": {"keep": 0.5}})
    report = run_bench(changed, methods=["ties", "dare"], seeds=[0], out=tmp_path)
    assert files(tmp_path).items() >= before.items()
    assert [name.split("-")[0] for name in files(tmp_path).keys() - before.keys()] == ["ties"]
    assert next(report.methods()).options == {"keep": 0.5}


def test_a_default_that_changes_makes_a_row_anew(tiny_suite: Path, tmp_path: Path, monkeypatch) -> None:
    suite = load_suite(tiny_suite)
    run_bench(suite, methods=["ties", "average"], out=tmp_path)
    before = files(tmp_path)

    def ties(tvs: TaskVectors, *, keep: float = 0.9) -> Weights:
        return METHODS["average"](tvs)

    monkeypatch.setattr("calmerge.methods.ties.ties", ties)
    run_bench(suite, methods=["ties", "average"], out=tmp_path)
    assert [name.split("-")[0] for name in files(tmp_path).keys() - before.keys()] == ["ties"]


def test_one_that_fails_keeps_its_reason_and_stops_nothing(tiny_suite: Path, tmp_path: Path, monkeypatch) -> None:
    def ties(tvs: TaskVectors) -> Weights:
        raise RuntimeError("singular")

    monkeypatch.setattr("calmerge.methods.ties.ties", ties)
    report = run_bench(load_suite(tiny_suite), methods=["slerp", "ties", "average"], out=tmp_path)
    slerp, broken, average = report.methods()
    assert slerp.status == "failed"
    assert (broken.status, broken.error) == ("failed", "RuntimeError: singular")
    assert average.status == "ok"
    monkeypatch.undo()
    assert [row.status for row in run_bench(load_suite(tiny_suite), methods=["ties"], out=tmp_path).methods()] == ["ok"]


def test_transductive_rows_are_added_and_stand_apart(tiny_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(tiny_suite)
    report = run_bench(suite, methods=["ties", "adamerging"], seeds=[0], transductive=True, out=tmp_path)
    blocks = {line.label: (line.split, line.block) for line in standings(report) if not line.is_reference}
    assert blocks == {
        "TIES": ("none", "one model"),
        "AdaMerging": ("inductive", "one model"),
        "AdaMerging (transductive)": ("transductive", "one model, transductive"),
    }


def test_the_page_and_the_csv_are_written(folder: Path) -> None:
    assert "CALM" in (folder / "report.html").read_text()
    lines = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert len(lines) == len(results.load(folder / "report.json").rows)
    emr = next(line for line in lines if line["label"] == "EMR-Merging")
    assert (emr["per_task"], emr["heads"]) == ("True", "frozen")


def test_an_unknown_method_is_an_error_before_any_work(tiny_suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no method is called 'tise'. Did you mean 'ties'"):
        run_bench(load_suite(tiny_suite), methods=["tise"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
