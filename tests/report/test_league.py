import math

import pytest

from calmerge.report.league import headline, mean, normalised, split_stamp, spread, standings
from calmerge.report.results import Report, Row, Score, TaskInfo, Versions

VERSIONS = Versions(calmerge="0.1.0", torch="2.9", python="3.11", platform="Linux")


def row(label: str, cars: float, dtd: float, **fields: object) -> Row:
    scores = {"cars": Score(accuracy=cars, n=400), "dtd": Score(accuracy=dtd, n=400)}
    return Row.model_validate({"method": label.lower(), "label": label, "scores": scores, **fields})


def made(*rows: Row) -> Report:
    tasks = [TaskInfo(name="cars"), TaskInfo(name="dtd")]
    return Report(title="t", created="2026-01-31", versions=VERSIONS, tasks=tasks, rows=list(rows))


def test_normalised_mean_is_a_mean_of_ratios() -> None:
    ties = standings(made(row("Experts", 0.5, 1.0), row("TIES", 0.5, 0.5)))[1]
    assert ties.mean == spread([0.5])
    assert ties.normalised_mean == spread([0.75])  # the ratio of the means would be 0.667
    assert ties.worst == ("dtd", 0.5)


def test_expert_with_nothing_right_gives_nan_not_an_exception() -> None:
    assert math.isnan(mean(normalised({"cars": 0.2}, {"cars": 0.0})))


def test_spread_over_seeds_is_that_of_the_means() -> None:
    report = made(row("DARE", 0.4, 0.6, seed=0), row("DARE", 0.6, 0.4, seed=1))
    dare = standings(report)[0]
    assert dare.mean == spread([0.5, 0.5])
    assert dare.mean.sd == 0
    assert dare.tasks is not None
    assert str(dare.tasks["cars"]) == "50.0 ± 14.1"


def test_order_is_references_then_best_mean_then_failed() -> None:
    report = made(
        Row(method="broken", label="Broken", status="failed", error="no"),
        row("TIES", 0.5, 0.5),
        row("Experts", 0.9, 0.9),
        row("CALM", 0.8, 0.8),
        row("Base", 0.3, 0.3),
    )
    assert [line.label for line in standings(report)] == ["Base", "Experts", "CALM", "TIES", "Broken"]
    assert standings(report)[-1].failures == ("no",)


def test_one_failed_seed_neither_hides_nor_spoils_the_others() -> None:
    failed = Row(method="calm", label="CALM", seed=1, status="failed", error="loss is not finite")
    calm = standings(made(row("CALM", 0.8, 0.6, seed=0), failed))[0]
    assert calm.mean == spread([0.7])
    assert calm.failures == ("loss is not finite",)


def test_headline_names_lead_split_and_seeds() -> None:
    report = made(
        row("Experts", 1.0, 1.0),
        row("CALM", 0.8, 0.8, seed=0, split="inductive"),
        row("CALM", 0.9, 0.9, seed=1, split="inductive"),
        row("TIES", 0.5, 0.7),
    )
    assert headline(report) == (
        "CALM leads with 85.0 ± 7.1 % accuracy on average over 2 tasks, 85.0 % of what the experts reach"
        " (inductive, 2 seeds): 25.0 points over TIES, the next best."
    )


def test_headline_says_when_a_lead_is_noise() -> None:
    said = headline(made(row("CALM", 0.8, 0.8), row("TIES", 0.8, 0.79)))
    assert said.endswith("0.5 points over TIES, the next best, less than the sampling error of 1.4.")


@pytest.mark.parametrize(
    ("splits", "stamp"),
    [(["none"], "no data used"), (["none", "transductive"], "transductive"), (["inductive"], "inductive")],
)
def test_stamp_names_every_split_used(splits: list[str], stamp: str) -> None:
    rows = [row(f"M{i}", 0.5, 0.5, split=split) for i, split in enumerate(splits)]
    assert split_stamp(made(*rows)) == stamp


def test_mixed_splits_are_both_named() -> None:
    rows = row("A", 0.5, 0.5, split="inductive"), row("B", 0.5, 0.5, split="transductive")
    assert split_stamp(made(*rows)) == "inductive + transductive"


def test_report_without_scores_has_no_numbers() -> None:
    line = standings(made(Row(method="ties", label="TIES", seconds=1.5)))[0]
    assert (line.mean, line.normalised_mean, line.worst, line.seconds) == (None, None, None, 1.5)
