import csv
import io

import pytest
from rich.console import Console

from calmerge.report.results import Report
from calmerge.report.tables import csv_table, league_table, markdown_table


def shown(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(league_table(report, width=width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_terminal_table_fits_and_loses_no_task_and_no_method(report: Report, width: int) -> None:
    text = shown(report, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    heads = [line.split() for line in text.splitlines() if line.startswith("method")]
    assert set().union(*heads) >= {task.name for task in report.tasks} | {"mean", "normalised", "time", "peak"}
    assert all(line.count("…") == 0 for line in text.splitlines())
    assert "unfinished" not in text


def test_wide_terminal_gets_one_table_narrow_ones_several(report: Report) -> None:
    assert [shown(report, width).count("accuracy in %, inductive") for width in (200, 100)] == [1, 3]


def test_failed_method_is_shown_with_its_reason(report: Report) -> None:
    for text in (shown(report, 100), markdown_table(report)):
        assert "DARE on TIES failed: expert 'tweets': loss is not finite at step 3." in text


def test_best_method_is_bold_references_never(report: Report) -> None:
    rows = {line.split("|")[1].strip(): line for line in markdown_table(report).splitlines() if line.startswith("|")}
    assert rows["CALM"].count("**") == 2 * 11
    assert "**" not in rows["Experts"]


def test_csv_has_one_line_per_run_and_exact_numbers(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(report))))
    assert len(lines) == len(report.rows)
    calm = next(line for line in lines if line["label"] == "CALM" and line["seed"] == "1")
    row = next(row for row in report.rows if row.label == "CALM" and row.seed == 1)
    assert float(calm["tweets"]) == row.scores["tweets"].accuracy
    failed = next(line for line in lines if line["status"] == "failed")
    assert failed["mean"] == ""


def test_unevaluated_merge_makes_a_table_too(report: Report) -> None:
    bare = report.model_copy(update={"tasks": [], "rows": [report.rows[2].model_copy(update={"scores": {}})]})
    assert "Averaging" in shown(bare, 80)
    assert markdown_table(bare).count("Averaging") == 1


def test_forty_rows_are_one_line_each_at_120_columns(report: Report) -> None:
    row = next(row for row in report.rows if row.label == "CALM")
    names = [f"Localize-and-Stitch {i}" for i in range(40)]
    more = [row.model_copy(update={"label": name, "bytes_out": 14_573_776, "trace": None}) for name in names]
    text = shown(report.model_copy(update={"rows": [*report.rows[:2], *more]}), 120)
    summary = text.split("Per task")[0].strip().splitlines()
    assert len(summary) == 2 + 2 + 40
    assert max(map(len, summary)) <= 120


def test_costs_and_sizes_are_in_the_table(report: Report) -> None:
    heads = next(line for line in shown(report, 200).splitlines() if line.startswith("method"))
    assert heads.split()[-5:] == ["time", "peak", "trained", "size", "data"]


def test_csv_tells_the_worst_task(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(report))))
    experts, calm = (next(line for line in lines if line["label"] == label) for label in ("Experts", "CALM"))
    ratios = {task.name: float(calm[task.name]) / float(experts[task.name]) for task in report.tasks}
    assert float(calm["worst"]) == min(ratios.values()) == ratios[calm["worst_task"]]
