"""Written files: the same bytes however they are computed, and nothing half-written ever."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import calmerge as cm
from calmerge import OutputError, StateDict, UsageError
from calmerge._random import uniform
from calmerge._writer import new_folder, write_weights

SHAPES = {"a": (37, 5), "b": (3,), "c": (), "d": (64, 9), "e": (0, 4)}


def weights() -> StateDict:
    tensors = {name: uniform(shape, name) for name, shape in SHAPES.items()}
    return StateDict(tensors | {"f": torch.arange(5), "g": uniform((8, 8), "g").bfloat16()})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_weights(tmp_path, weights())
    read = load_file(tmp_path / "model.safetensors")
    for name, tensor in weights().items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


@pytest.mark.parametrize("chunk", [2**4, 2**10, 2**20])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_same_bytes_for_any_chunk_and_threads(chunk: int, threads: int, tmp_path: Path) -> None:
    for folder, options in {"one": {}, "other": {"chunk": chunk, "threads": threads}}.items():
        (tmp_path / folder).mkdir()
        tvs = cm.task_vectors(weights(), {"x": weights(), "y": {n: 2 * w for n, w in weights().items()}})
        write_weights(tmp_path / folder, cm.add(tvs.base, cm.ties(tvs, keep=0.3)), **options)  # type: ignore[arg-type]
    first, second = (tmp_path / f / "model.safetensors" for f in ("one", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_shards_hold_the_same_tensors_and_open_as_one(tmp_path: Path) -> None:
    files = write_weights(tmp_path, weights(), shard=1000)
    assert len(files) > 2
    opened = cm.open_checkpoint(tmp_path)
    for name, tensor in weights().items():
        assert torch.equal(opened[name], tensor)


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    from calmerge._checkpoint import sha256

    files = write_weights(tmp_path, weights())
    assert files == {"model.safetensors": sha256(tmp_path / "model.safetensors")}


def test_a_size_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard must be a size like 5GB or 500MB, got 'big'"):
        write_weights(tmp_path, weights(), shard="big")


def test_a_folder_with_content_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="'out' is not empty; nothing was written"), new_folder(tmp_path / "out"):
        raise AssertionError("never entered")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "precious.txt"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"'out' needs 1000000000\.00 GB, and the disk has"):  # noqa: SIM117
        with new_folder(tmp_path / "out", need=10**18):
            raise AssertionError("never entered")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    tvs = cm.task_vectors(weights(), {"x": weights()})
    with pytest.raises(OutputError, match="'out' cannot be written: No space left on device"):
        cm.save(tmp_path / "out", tvs, cm.average(tvs))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or shutil.which("env") is None, reason="needs POSIX signals")
def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch, calmerge as cm\n"
        "base = {str(i): torch.ones(9) for i in range(99)}\n"
        "slow = cm.StateDict(base).map(lambda w, s: (time.sleep(0.05), w)[1])\n"
        "tvs = cm.task_vectors(base, {'x': base})\n"
        "print('go', flush=True)\n"
        "cm.save(sys.argv[1], tvs, slow, threads=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.") for p in tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc to tell whether a process lives")
def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    for pid in (2**30, os.getppid()):
        (tmp_path / f".out.{pid}.partial").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out.{os.getppid()}.partial", "out"]
