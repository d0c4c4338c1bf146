"""Making what a suite needs and does not have: base, data and experts, each once, in the cache."""

import fcntl
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from calmerge._errors import CheckpointError
from calmerge._run import Run
from calmerge.suites.suite import Suite, missing_files


def prepare(suite: Suite, names: Sequence[str] | None = None, *, run: Run | None = None) -> None:
    """Fetch or make the base, the data and the experts of a suite that are not there; what is there stays.

    Embedded suites fetch packages and write base and data into the cache; experts are fine-tuned as the suite's
    `finetune` says wherever a task names a `train` split. Every finished part is put in place by a rename, so that an
    interrupted call goes on where it was. Of several processes that need the same suite one makes it, and the others
    wait.

    Args:
        suite: as `load_suite` gives it.
        names: only the experts of these tasks; all when None.
        run: progress.

    Raises:
        CheckpointError: files are missing that nobody can make; all of them are named.
    """
    run = run or Run()
    with _alone(suite.folder) if suite.make or _absent(suite, names) else nullcontext():
        if suite.make:
            importlib.import_module(suite.make).make(suite.folder, run)
        missing = missing_files(suite)
        if missing:
            raise CheckpointError("\n".join(missing))
        wanted = _absent(suite, names)
        if wanted:
            from calmerge.suites.finetune import make_experts

            make_experts(suite.data, suite.folder, wanted, run=run)


def _absent(suite: Suite, names: Sequence[str] | None) -> list[str]:
    """Tasks whose experts are not there."""
    return [
        name
        for name in (suite.tasks if names is None else names)
        if isinstance(expert := suite.tasks[name].expert, Path) and not (expert / "config.json").is_file()
    ]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes what belongs into a folder; not where it cannot be written, or has no locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger("calmerge").warning("another process is making '%s'; waiting for it", folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
