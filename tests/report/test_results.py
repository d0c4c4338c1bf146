import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from calmerge._errors import DataError, OutputError
from calmerge.report.results import Input, Report, Row, Score, TaskInfo, Versions, dump, dumps, load, loads, write_text
from calmerge.report.traces import CalmTrace, Coefficients, FitTrace, Histogram

VERSIONS = Versions(calmerge="0.1.0", torch="2.9", python="3.11", platform="Linux")


def small(**fields: object) -> Report:
    return Report(title="small", created="2026-01-31T12:00:00", versions=VERSIONS, **fields)


def test_round_trip_through_a_file(report: Report, tmp_path: Path) -> None:
    assert load(dump(report, tmp_path / "deep" / "report.json")) == report
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_same_report_same_bytes(report: Report) -> None:
    assert dumps(loads(dumps(report))) == dumps(report)


def test_schema_is_the_first_field() -> None:
    assert dumps(small()).startswith('{\n "schema": 1,\n')


def test_loss_that_is_not_finite_stays_valid_json_and_comes_back() -> None:
    row = Row(method="calm", label="CALM", trace=FitTrace(loss=[1.0, float("inf")]))
    text = dumps(small(rows=[row]))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    trace = loads(text).rows[0].trace
    assert isinstance(trace, FitTrace)
    assert trace.loss == [1.0, float("inf")]


def test_trace_kinds_are_told_apart(report: Report) -> None:
    kinds = {row.label: type(row.trace) for row in report.rows if row.trace}
    assert kinds == {"CALM": CalmTrace, "AdaMerging": FitTrace, "AdaMerging++": FitTrace}


def test_misspelt_and_missing_fields_are_listed_together() -> None:
    fields = json.loads(dumps(small()))
    fields["seedz"] = [1]
    del fields["title"]
    with pytest.raises(DataError, match=r"title: Field required; seedz: Extra inputs are not permitted"):
        loads(json.dumps(fields))


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "schema None"), ('{"schema": 9}', "schema 9")])
def test_foreign_files_are_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        loads(text, source="report.json")


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(path, "text")
    assert path.is_dir()
    assert list(tmp_path.iterdir()) == [path]


def test_rows_added_later_are_checked_at_dump() -> None:
    made = small(tasks=[TaskInfo(name="cars")])
    made.rows.append(Row(method="ties", label="TIES", scores={"dtd": Score(accuracy=0.5, n=10)}))
    with pytest.raises(ValidationError, match="row 'TIES' has scores for"):
        dumps(made)


def test_two_rows_of_one_label_and_seed_are_refused() -> None:
    row = Row(method="ties", label="TIES")
    with pytest.raises(ValidationError, match=r"found twice: TIES \(seed None\)"):
        small(rows=[row, row])


@pytest.mark.parametrize("fields", [{"status": "failed"}, {"error": "why"}])
def test_failure_and_reason_come_together(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="contradict"):
        Row.model_validate({"method": "ties", "label": "TIES", **fields})


def test_accuracy_in_per_cent_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Score(accuracy=83.5, n=10)


@pytest.mark.parametrize("edges", [[1, 2], [1, 3, 2], [0, 1, 2], [1, 1, 2]])
def test_histogram_edges_must_rise_above_zero(edges: list[float]) -> None:
    with pytest.raises(ValidationError):
        Histogram(edges=edges, counts=[1, 2])


def test_coefficients_must_be_rectangular() -> None:
    with pytest.raises(ValidationError, match=r"1 rows \(tensors\) of 2 values"):
        Coefficients(tasks=["a", "b"], tensors=["w"], values=[[0.3]])


@pytest.mark.parametrize(
    ("label", "kept"),
    [("/home/ann/experts/cars/", "cars"), ("google/vit-base", "google/vit-base"), (r"D:\models\cars", "cars")],
)
def test_labels_lose_the_folders_of_the_machine(label: str, kept: str) -> None:
    assert Input(label=label).label == kept
