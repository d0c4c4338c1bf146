"""The demo: four text tasks, five methods, one page, in a few minutes on a small machine."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calmerge._run import Run
from calmerge.suites.suite import load_suite

if TYPE_CHECKING:
    from calmerge._yaml import Data
    from calmerge.report.results import Report

TASKS = ("movies", "candidates", "products", "reuters")
METHODS = ("average", "task_arithmetic", "ties", "adamerging", "calm")
OPTIONS: "dict[str, dict[str, Data]]" = {
    "adamerging": {"steps": 12, "batches": 1},
    "calm": {"sequential": 1, "steps": 16, "batch": 32, "batches": 1},
}
"""Fewer updates than in the suite, chosen by the clock: see `calmerge bench text` for the comparison."""


def run_demo(*, out: Path, run: Run | None = None) -> "Report":
    """The report on four tasks of the suite `text`, with base, data and experts made if they are not in the cache.

    Args:
        out: folder of `report.json` and `report.html`.
        run: progress.

    Raises:
        DataError: a package cannot be fetched.
        OutputError: nothing can be written into `out`.
    """
    from calmerge.league import run_bench

    suite = load_suite("text")
    small = replace(
        suite,
        title="calmerge demo: four text tasks on MiniLM",
        methods={**suite.methods, **OPTIONS},
        notes=[
            f"AdaMerging makes {OPTIONS['adamerging']['steps']} updates and CALM {OPTIONS['calm']['steps']}, numbers "
            "chosen by the clock: this shows how things work, and is no benchmark. For one, run: calmerge bench text"
        ],
    )
    return run_bench(small, methods=METHODS, seeds=[0], tasks=TASKS, command="calmerge demo", run=run, out=out)
