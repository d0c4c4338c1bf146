"""Making what a suite needs and does not have: base, data and experts, each once, in the cache."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from calmerge._errors import CheckpointError
from calmerge._run import Run
from calmerge.suites.suite import Suite, missing_files


def prepare(suite: Suite, names: Sequence[str] | None = None, *, run: Run | None = None) -> None:
    """Fetch or make the base, the data and the experts of a suite that are not there; what is there stays.

    Embedded suites fetch packages and write base and data into the cache; experts are fine-tuned as the suite's
    `finetune` says wherever a task names a `train` split. Every finished part is put in place by a rename, so that an
    interrupted call goes on where it was.

    Args:
        suite: as `load_suite` gives it.
        names: only the experts of these tasks; all when None.
        run: progress.

    Raises:
        CheckpointError: files are missing that nobody can make; all of them are named.
    """
    run = run or Run()
    if suite.make:
        importlib.import_module(suite.make).make(suite.folder, run)
    missing = missing_files(suite)
    if missing:
        raise CheckpointError("\n".join(missing))
    wanted = [
        name
        for name in (suite.tasks if names is None else names)
        if isinstance(expert := suite.tasks[name].expert, Path) and not (expert / "config.json").is_file()
    ]
    if wanted:
        from calmerge.suites.finetune import make_experts

        make_experts(suite.data, suite.folder, wanted, run=run)
