"""Machine code kept on disk: found again, made anew where it is not whole, and never in the way."""

from pathlib import Path

import pytest

from calmerge._objects import kept


def test_code_is_made_once_for_a_key(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> bytes:
        made.append(name)
        return name.encode()

    found = [kept(tmp_path, key, lambda key=key: make(key)) for key in ("a", "b", "a", "b")]
    assert (found, made) == ([b"a", b"b", b"a", b"b"], ["a", "b"])
    assert len(list(tmp_path.iterdir())) == 2  # nothing beside them


@pytest.mark.parametrize("size", [0, 10, 35])
def test_a_file_that_was_cut_short_is_made_anew(size: int, tmp_path: Path) -> None:
    kept(tmp_path, "key", lambda: b"code")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    assert kept(tmp_path, "key", lambda: b"code") == b"code"
    assert file.read_bytes() == whole


def test_without_a_place_it_is_compiled_each_time(tmp_path: Path) -> None:
    for place in (None, tmp_path / "missing"):
        assert kept(place, "key", lambda: b"code") == b"code"
    assert not list(tmp_path.iterdir())
