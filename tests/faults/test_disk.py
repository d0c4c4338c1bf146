"""A disk that fills up, fails or may not be written: one clear error, and nothing is left behind."""

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from calmerge._random import uniform
from calmerge.cli import app

SIZE = 2**21  # bytes of the disk
WEIGHTS = 4_000_000  # bytes of the merged weights


@pytest.fixture
def recipe(tmp_path: Path, write_folder: Callable[..., Path]) -> Path:
    base = {f"layers.{i}.w": uniform((250, 400), i) for i in range(10)}
    write_folder(tmp_path / "in" / "base", base)
    write_folder(tmp_path / "in" / "a", {n: w + 1 for n, w in base.items()} | {"head.weight": torch.ones(3, 400)})
    (tmp_path / "in" / "r.yaml").write_text("base: ./base\nexperts: {a: ./a}\nmerge: task_arithmetic\n")
    return tmp_path / "in" / "r.yaml"


class Disk(NamedTuple):
    """A small disk, what the system says when it is full, and whether it is one."""

    folder: Path
    full: str
    real: bool


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A real one where the system lets us mount it; otherwise files that may not grow."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mounted(folder, f"size={SIZE}"):
        yield Disk(folder, os.strerror(errno.ENOSPC), real=True)
        subprocess.run(["umount", folder], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    yield Disk(folder, os.strerror(errno.EFBIG), real=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def mounted(folder: Path, options: str) -> bool:
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def merge(recipe: Path, out: Path) -> Any:
    return CliRunner().invoke(app, ["merge", str(recipe), "--out", str(out), "-q"])


def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says that there is room, as before another program took it."""
    usage = shutil.disk_usage(Path(__file__))._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def check_failure(done: Any, says: str, folder: Path) -> None:
    assert done.exit_code == 1, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    recipe: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(disk.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=min(usage.free, SIZE)))
    check_failure(merge(recipe, disk.folder / "out"), "'out' needs 0.00 GB, and the disk has 0.00 GB left", disk.folder)


def test_a_disk_that_fills_up_while_it_is_written_to(recipe: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy(monkeypatch)
    check_failure(merge(recipe, disk.folder / "out"), f"'out' cannot be written: {disk.full}", disk.folder)


def test_a_disk_that_fills_up_when_the_last_files_are_written(
    recipe: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights fit, the records behind them do not."""
    if disk.real:
        subprocess.run(["mount", "-o", f"remount,size={WEIGHTS + 5 * 4096}", disk.folder], check=True)
    else:
        monkeypatch.setattr("calmerge._save.write_json", fail)
    check_failure(merge(recipe, disk.folder / "out"), "'out' cannot be written: ", disk.folder)


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_a_disk_that_fails_in_any_call(
    call: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os, call, fail)
    done = merge(recipe, tmp_path / "disk" / "out")
    monkeypatch.undo()
    check_failure(done, "'out' cannot be written: Input/output error. No folder was left there.", tmp_path / "disk")


def test_a_place_that_may_only_be_read(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    says = "Read-only file system"
    real = mounted(folder, "ro")
    if not real and os.geteuid() != 0:
        folder.chmod(0o555)
        says = "Permission denied"
    elif not real:  # to root every folder is open
        refuse(monkeypatch, folder)
    try:
        check_failure(merge(recipe, folder / "out"), f"'out' cannot be written: {says}", folder)
        check_failure(merge(recipe, folder / "deeper" / "out"), f"'out' cannot be written: {says}", folder)
    finally:
        if real:
            subprocess.run(["umount", folder], check=True)


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing can be made in `folder`."""
    mkdir, opened = Path.mkdir, Path.open

    def checked(call: Callable[..., Any]) -> Callable[..., Any]:
        def checking(path: Path, *args: Any, **kwargs: Any) -> Any:
            if folder in path.parents and not (path.exists() or str(args[:1]).startswith("('r")):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return call(path, *args, **kwargs)

        return checking

    monkeypatch.setattr(Path, "mkdir", checked(mkdir))
    monkeypatch.setattr(Path, "open", checked(opened))


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out"])
def test_a_place_inside_a_file(place: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("mine")
    done = merge(recipe, tmp_path / "disk" / place)
    assert done.exit_code == 1
    assert "'out' cannot be written: " in done.stderr
    assert (tmp_path / "disk" / "file").read_text() == "mine"


def test_names_that_are_too_long(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    check_failure(
        merge(recipe, tmp_path / "disk" / ("x" * 250)), "cannot be written: File name too long", tmp_path / "disk"
    )
