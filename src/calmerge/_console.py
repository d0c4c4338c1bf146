"""Progress on a terminal: bars where there is one to draw on, a line now and then where there is not.

Everything goes to the error stream, so that results on the output stream can be piped.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from calmerge._run import Progress, Silent, Step

if TYPE_CHECKING:
    import rich.progress

EVERY = 10.0
"""Seconds between two lines of the same work where bars cannot be drawn."""


def console_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What shows progress on `stream`: nothing if quiet, bars on a terminal, lines elsewhere.

    >>> isinstance(console_progress(quiet=True), Silent)
    True
    """
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    return Bars(stream) if stream.isatty() else Lines(stream)


def show_notes(*, quiet: bool = False) -> None:
    """Print what the library logs to the error stream, a line each; of a quiet run its warnings only."""
    logger = logging.getLogger("calmerge")
    logger.handlers = [_Notes()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        sys.stderr.write(f"{kind}: {record.getMessage()}\n")


class Bars:
    """Bars with rate, time left and the last loss; bars of inner work stand below the outer ones and go when done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: rich.progress.Progress | None = None
        self._open = 0

    @contextmanager
    def track(self, label: str, total: float, unit: str = "it") -> Iterator[Step]:
        """One bar, up to `total`."""
        if self._shown is None:
            self._shown = _bars(self._stream)
            self._shown.start()
        self._open += 1
        task = self._shown.add_task(label, total=total, unit=unit, info="")
        try:
            yield _Bar(self._shown, task)
        finally:
            self._shown.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._shown.stop()
                self._shown = None


@dataclass
class _Bar:
    shown: "rich.progress.Progress"
    task: Any

    def advance(self, n: float = 1, **info: object) -> None:
        """Move on by `n`, and show `info` beside the bar."""
        if info:
            self.shown.update(self.task, advance=n, info=facts(info))
        else:
            self.shown.update(self.task, advance=n)


@dataclass
class Lines:
    """A line per work when it ends, and one every ten seconds while it goes on.

    >>> import io
    >>> stream, clock = io.StringIO(), iter([0.0, 4.0, 20.0, 30.0])
    >>> with Lines(stream, clock=lambda: next(clock)).track("fitting", 4) as step:
    ...     step.advance(1, loss=2.0)
    ...     step.advance(1, loss=1.25)
    >>> print(stream.getvalue(), end="")
    fitting: 2/4 it, 50 %, 0.1 it/s, 20 s left, loss 1.25
    fitting: done in 30 s, loss 1.25
    """

    stream: TextIO
    every: float = EVERY
    clock: Callable[[], float] = field(default=time.monotonic)

    @contextmanager
    def track(self, label: str, total: float, unit: str = "it") -> Iterator[Step]:
        """Lines for one piece of work."""
        step = _Line(self, label, total, unit, self.clock())
        yield step
        step.end()


@dataclass
class _Line:
    lines: Lines
    label: str
    total: float
    unit: str
    start: float
    done: float = 0
    last: float = field(init=False)
    info: str = ""

    def __post_init__(self) -> None:
        self.last = self.start

    def advance(self, n: float = 1, **info: object) -> None:
        """Move on by `n`; print a line if the last one is old."""
        self.done += n
        self.info = facts(info) or self.info
        now = self.lines.clock()
        if now - self.last < self.lines.every:
            return
        self.last = now
        rate = self.done / (now - self.start)
        parts = [f"{_amount(self.done, self.unit)}/{_amount(self.total, self.unit)} {_unit(self.unit)}".rstrip()]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        parts.append(f"{_amount(rate, self.unit)} {_unit(self.unit)}/s".replace(" /s", "/s"))
        if rate > 0:
            parts.append(f"{seconds((self.total - self.done) / rate)} left")
        self._print(", ".join([*parts, *([self.info] if self.info else [])]))

    def end(self) -> None:
        """The last line of the work; short work leaves none."""
        spent = self.lines.clock() - self.start
        if self.last != self.start or spent >= self.lines.every:
            self._print(f"done in {seconds(spent)}" + (f", {self.info}" if self.info else ""))

    def _print(self, text: str) -> None:
        self.lines.stream.write(f"{self.label}: {text}\n")
        self.lines.stream.flush()


def facts(info: dict[str, object]) -> str:
    """Facts beside a bar: numbers short, names as they are.

    >>> facts({"loss": 1.23456, "task": "cars"})
    'loss 1.235, cars'
    """
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, (int, float)) else str(v) for k, v in info.items())


def seconds(value: float) -> str:
    """A duration: "20 s", "3 min 20 s", "2 h 5 min".

    >>> seconds(20), seconds(200), seconds(7500)
    ('20 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        from rich.filesize import decimal

        return str(decimal(int(value)))
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.2g}"


def _unit(unit: str) -> str:
    return "" if unit == "B" else unit


def _bars(stream: TextIO) -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit = task.fields["unit"]
            text = f"{_amount(task.completed, unit)}/{_amount(task.total or 0, unit)} {_unit(unit)}".rstrip()
            rate = task.speed or task.finished_speed
            return Text(text + (f"  {_amount(rate, unit)} {_unit(unit)}/s".replace(" /s", "/s") if rate else ""))

    def one_line() -> Column:
        return Column(no_wrap=True, overflow="ellipsis")

    return Progress(
        TextColumn("{task.description}", table_column=one_line()),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f} %", table_column=one_line()),
        Amount(one_line()),
        TimeRemainingColumn(compact=True, table_column=one_line()),
        TextColumn("[dim]{task.fields[info]}", table_column=one_line()),
        console=Console(file=stream),
        transient=True,
    )
