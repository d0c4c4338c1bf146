"""What the demo hands to the bench."""

from typing import Any

import pytest

import calmerge.league
import calmerge.suites.prepare
from calmerge.suites import demo


def test_its_page_tells_its_own_updates_and_not_the_suite_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    handed: dict[str, Any] = {}
    monkeypatch.setattr(calmerge.suites.prepare, "prepare", lambda *args, **options: None)
    monkeypatch.setattr(calmerge.league, "run_bench", lambda suite, **options: handed.update(suite=suite, **options))
    demo.run_demo(out=tmp_path)
    (note,) = handed["suite"].notes
    assert "AdaMerging makes 12 updates and CALM 16" in note
    assert handed["suite"].methods["adamerging"]["steps"] == 12
    assert handed["suite"].methods["calm"]["steps"] == 16
    assert handed["tasks"] == demo.TASKS
