"""The league on a tiny suite: complete, resumable, honest about what it saw."""

from pathlib import Path

import pytest

from calmerge import UsageError
from calmerge.league import run_bench
from calmerge.report import results
from calmerge.suites.suite import load_suite

ALL = ["Base", "Experts", "Averaging", "Task Arithmetic 0.3", "Task Arithmetic, tuned", "TIES", "DARE", "AdaMerging"]


@pytest.fixture(scope="module")
def folder(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("league")
    run_bench(load_suite(tiny_suite), seeds=[0, 1], out=out, command="calmerge bench tiny")
    return out


def test_every_method_has_its_rows(folder: Path) -> None:
    report = results.load(folder / "report.json")
    seeds = {}
    for row in report.rows:
        assert row.status == "ok", row.error
        assert set(row.scores) == {"colours", "shapes", "sizes"}
        seeds.setdefault(row.label, []).append(row.seed)
    assert list(seeds) == [*ALL, "AdaMerging++", "CALM"]
    assert seeds["TIES"] == [None]
    assert seeds["CALM"] == seeds["DARE"] == [0, 1]


def test_rows_say_what_they_saw(folder: Path) -> None:
    rows = {row.label: row for row in results.load(folder / "report.json").rows}
    assert (rows["TIES"].data, rows["TIES"].split) == ("none", "none")
    assert (rows["CALM"].data, rows["CALM"].split) == ("unlabelled pool", "inductive")
    assert rows["Task Arithmetic, tuned"].data == "validation labels"
    assert rows["CALM"].trace is not None
    assert len(rows["CALM"].trace.stages) == 1


def test_finished_rows_are_used_again(folder: Path, tiny_suite: Path) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in (folder / "rows").iterdir()}
    first = results.load(folder / "report.json")
    again = run_bench(load_suite(tiny_suite), seeds=[0, 1], out=folder)
    assert {f.name: f.stat().st_mtime_ns for f in (folder / "rows").iterdir()} == before
    assert again.rows == first.rows


def test_same_seed_same_scores(folder: Path, tiny_suite: Path, tmp_path: Path) -> None:
    first = {(r.label, r.seed): r.scores for r in results.load(folder / "report.json").rows}
    again = run_bench(load_suite(tiny_suite), methods=["calm", "dare"], seeds=[1], out=tmp_path)
    for row in again.methods():
        assert row.scores == first[row.label, 1]


def test_the_page_is_written(folder: Path) -> None:
    assert "CALM" in (folder / "report.html").read_text()


def test_an_unknown_method_is_an_error_before_any_work(tiny_suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no method is called 'tise'. Did you mean 'ties'\?"):
        run_bench(load_suite(tiny_suite), methods=["tise"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
