"""Progress on a terminal, in a log, and none."""

import io

import pytest

from calmerge._console import Bars, Lines, console_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


def test_quiet_shows_nothing() -> None:
    stream = Terminal()
    with console_progress(quiet=True, stream=stream).track("work", 2) as step:
        step.advance(1, loss=1.0)
    assert stream.getvalue() == ""


def test_a_terminal_gets_bars_and_a_file_gets_lines() -> None:
    assert isinstance(console_progress(stream=Terminal()), Bars)
    assert isinstance(console_progress(stream=io.StringIO()), Lines)


def test_bars_nest_show_facts_and_leave_the_screen_clean() -> None:
    stream = Terminal()
    bars = Bars(stream)
    with bars.track("outer", 2, "row") as outer:
        with bars.track("writing", 2_000_000, "B") as inner:
            inner.advance(1_000_000)
        outer.advance(1, loss=0.12345, task="cars")
        assert bars._shown is not None
        bars._shown.refresh()
    assert bars._shown is None
    shown = stream.getvalue()
    for part in ("outer", "1/2 row", "50 %", "loss 0.1235, cars"):
        assert part in shown


def test_bars_stop_when_the_work_fails() -> None:
    bars = Bars(Terminal())
    with pytest.raises(ValueError, match="broken"), bars.track("work", 2):
        raise ValueError("broken")
    assert bars._shown is None


def test_short_work_leaves_no_line() -> None:
    stream = io.StringIO()
    with Lines(stream, clock=Clock(0, 1, 2)).track("work", 2) as step:
        step.advance()
    assert stream.getvalue() == ""


def test_long_work_says_how_far_it_is() -> None:
    stream = io.StringIO()
    with Lines(stream, clock=Clock(0, 20, 25, 100)).track("writing", 4_000_000, "B") as step:
        step.advance(1_000_000)
        step.advance(1_000_000)
    assert stream.getvalue().splitlines() == [
        "writing: 1.0 MB/4.0 MB, 25 %, 50.0 kB/s, 1 min 0 s left",
        "writing: done in 1 min 40 s",
    ]


def test_no_last_line_for_work_that_failed() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Lines(stream, clock=Clock(0, 20, 30)).track("work", 2):
        raise ValueError("broken")
    assert stream.getvalue() == ""
