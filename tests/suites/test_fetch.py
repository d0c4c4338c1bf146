import subprocess
from pathlib import Path
from typing import Any

import pytest

from calmerge._errors import DataError, UsageError
from calmerge.suites import _fetch
from calmerge.suites._fetch import archive_of, cache_folder, fetch


def pip_that_writes(name: str | None, calls: list[list[str]], stderr: str = "") -> Any:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if name is not None:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(b"archive")
        return subprocess.CompletedProcess(command, 0 if name else 1, "", stderr)

    return run


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CALMERGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CALMERGE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "calmerge"


def test_downloads_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(_fetch.subprocess, "run", pip_that_writes("some_fonts-1.0-py3-none-any.whl", calls))
    first = fetch("some-fonts==1.0", cache=tmp_path)
    assert first == tmp_path / "some_fonts-1.0-py3-none-any.whl"
    assert fetch("some-fonts==1.0", cache=tmp_path) == first
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert sorted(tmp_path.iterdir()) == [first]


def test_source_archives_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(_fetch.subprocess, "run", pip_that_writes("some-words-2.5.tar.gz", calls))
    assert fetch("Some.Words==2.5", cache=tmp_path, sdist=True).name == "some-words-2.5.tar.gz"
    assert "--no-binary" in calls[0]


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stderr = "WARNING: retrying\nERROR: No matching distribution found for fonts==1.0\n"
    monkeypatch.setattr(_fetch.subprocess, "run", pip_that_writes(None, [], stderr))
    with pytest.raises(DataError, match=r"No matching distribution.*pip download --no-deps fonts==1.0"):
        fetch("fonts==1.0", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["fonts", "fonts>=1", "fonts==", "==1", "--index==1"])
def test_only_pinned_packages(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pinned package"):
        fetch(text, cache=tmp_path)


def test_wheels_and_source_archives_are_not_mixed_up(tmp_path: Path) -> None:
    for name in ("a_b-1.0-py3-none-any.whl", "a-b-1.0.tar.gz", "a_b-1.0.1-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert archive_of(tmp_path, "a-b", "1.0").name == "a_b-1.0-py3-none-any.whl"  # type: ignore[union-attr]
    assert archive_of(tmp_path, "a-b", "1.0", sdist=True).name == "a-b-1.0.tar.gz"  # type: ignore[union-attr]
    assert archive_of(tmp_path, "a-b", "2.0") is None
