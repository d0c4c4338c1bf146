"""Files that are kept open for a stretch of tensors, and closed at its end."""

import os
from pathlib import Path

import pytest

from calmerge import _handles as handles_file
from calmerge._handles import handle_of, kept_open


def is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def use(file: Path) -> int:
    with handle_of(file.name, lambda: os.open(file, os.O_RDONLY)) as handle:
        assert is_open(handle)
        return handle


def test_a_file_is_closed_at_once_where_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert not is_open(use(tmp_path / "a"))


def test_a_file_is_opened_once_in_a_stretch_and_closed_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with kept_open():
        with kept_open():  # of the same thread
            first = use(tmp_path / "a")
        assert use(tmp_path / "a") == first
        assert is_open(first)
    assert not is_open(first)
    assert not is_open(use(tmp_path / "a"))


def test_files_beyond_the_most_are_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles_file, "_MOST", 1)
    for name in "ab":
        (tmp_path / name).touch()
    with kept_open():
        kept, other = use(tmp_path / "a"), use(tmp_path / "b")
        assert (is_open(kept), is_open(other)) == (True, False)


def test_files_are_closed_when_the_work_fails(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    found: list[int] = []

    @kept_open()
    def work() -> None:
        found.append(use(tmp_path / "a"))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert not is_open(found[0])
