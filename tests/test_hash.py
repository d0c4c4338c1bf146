"""Hashes of files that are whole, and of files that grow."""

from pathlib import Path

import pytest
from blake3 import blake3

from calmerge import _hash
from calmerge._hash import Growing, hash_of

CONTENT = bytes(range(256)) * 5


def test_a_file_has_the_hash_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hash, "_PIECE", 100)
    (tmp_path / "f").write_bytes(CONTENT)
    assert hash_of(tmp_path / "f") == blake3(CONTENT).hexdigest()


def test_what_lies_behind_the_end_that_is_named_is_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hash, "_PIECE", 100)
    with (tmp_path / "f").open("w+b", buffering=0) as f:
        f.truncate(len(CONTENT))
        growing = Growing(f.fileno())
        f.write(CONTENT[:300])
        growing.upto(250)
        f.write(CONTENT[300:])
        growing.upto(len(CONTENT))
    assert growing.found() == blake3(CONTENT).hexdigest()


def test_a_file_that_ends_early_is_hashed_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    with (tmp_path / "f").open("rb") as f:
        growing = Growing(f.fileno())
        growing.upto(10 * len(CONTENT))
    assert growing.found() == blake3(CONTENT).hexdigest()
