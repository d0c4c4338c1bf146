"""What surrounds long work: whom it tells, where it may resume from, and what it leaves on record."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol


class Step(Protocol):
    """The handle of one progress bar."""

    def advance(self, n: float = 1, **info: object) -> None:
        """Move on by `n` units; `info` (a loss, a name) is shown beside the bar."""


class Progress(Protocol):
    """Anything that can show progress; the command line brings bars, the library stays silent."""

    def track(self, label: str, total: float, unit: str = "it") -> AbstractContextManager[Step]:
        """A context whose handle is advanced up to `total`; `unit` is "it" or "B" (bytes)."""


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def track(self, label: str, total: float, unit: str = "it") -> Iterator[Step]:
        """A context that shows nothing."""
        yield self

    def advance(self, n: float = 1, **info: object) -> None:
        """Nothing."""


@dataclass
class Run:
    """The surroundings of one piece of work, handed down through `run=`.

    Args:
        folder: where resumable work keeps its state; None keeps no state.
        progress: whom to tell.
        trace: what fitted methods leave behind (loss curves, masks' densities), as plain JSON values by method.
        trained: how many numbers every fit moved, in turn.
        earlier: seconds that fits had taken when they were stopped, of those that went on here.

    >>> run = Run()
    >>> with run.progress.track("merging", 3) as step:
    ...     step.advance(3)
    >>> run.trace
    {}
    """

    folder: Path | None = None
    progress: Progress = field(default_factory=Silent)
    trace: dict[str, Any] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    earlier: list[float] = field(default_factory=list)

    def within(self, name: str) -> "Run":
        """The same surroundings with the state kept in a sub-folder, so that two stages never share a file."""
        return replace(self, folder=self.folder / name if self.folder else None)
