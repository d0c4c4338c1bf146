"""Making suites."""

import fcntl
import logging
import threading
from pathlib import Path

import pytest

from calmerge.suites.prepare import _alone


def test_a_suite_is_made_by_one_process_while_others_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order = []
    with (tmp_path / ".lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def second() -> None:
            with _alone(tmp_path):
                order.append("second")

        with caplog.at_level(logging.WARNING, "calmerge"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
        order.append("first")
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join()
    assert order == ["first", "second"]
    assert "waiting" in caplog.text


def test_a_finished_suite_on_a_read_only_disk_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with _alone(tmp_path):
        pass
