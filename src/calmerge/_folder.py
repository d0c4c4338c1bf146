"""A folder that appears when it is whole, and the journal from which a stopped run goes on."""

import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from calmerge._errors import OutputError
from calmerge._hash import ALGORITHM

_log = logging.getLogger("calmerge")
_MOST_NUMBERS = 2**20  # measured numbers that a journal keeps; more are measured again


@contextmanager
def new_folder(path: Path, *, need: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well, and is gone when it does not.

    Until the end it lies beside `path` under a name that starts with a dot, so that a killed run leaves nothing that
    looks finished. A journal beside it is locked meanwhile, so that two runs never fill the same folder.

    Args:
        path: must not exist, or be an empty folder.
        need: bytes that will be written; checked against the free space of the disk before anything is.

    Raises:
        OutputError: the place is taken, cannot be written, is too small, or another run is writing there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with new_folder(Path(place) / "merged") as folder:
    ...         _ = (folder / "a.txt").write_text("a")
    ...     sorted(p.name for p in (Path(place) / "merged").iterdir())
    ['a.txt']
    """
    with resumable_folder(path, need=need) as (folder, _):
        yield folder


@contextmanager
def resumable_folder(
    path: Path, *, need: int = 0, key: Mapping[str, str] | None = None, resume: bool = False
) -> "Iterator[tuple[Path, Journal]]":
    """As `new_folder`, with a journal of what is finished; a run that was stopped can go on from it.

    What a killed or interrupted run leaves is kept until the next run to the same place, which goes on from it if it
    is told to, and otherwise removes it. A run that fails by itself leaves nothing, or what it was resumed from.

    Args:
        path, need: as in `new_folder`.
        key: what the content depends on, by name; without it nothing is kept of an interrupted run.
        resume: whether to go on from what a stopped run of the same key left.

    Raises:
        OutputError: as `new_folder`, or `resume` and what is there was begun with another key.
    """
    path = path.absolute()
    check_free(path)
    partial = path.with_name(f".{path.name}.partial")
    with _errors_of(path), _locked(path.with_name(f".{path.name}.journal"), path) as file:
        journal = Journal(file, key or {}, partial)
        keep = resumed = resume and partial.is_dir() and journal.recover(path)
        try:
            check_free(path)  # again: another run may have finished between the look and the lock
            if not resumed:
                _clear(partial, path)
                journal.begin()
                partial.mkdir()
            for left in [p for p in partial.rglob("*") if p.is_file()]:
                if journal.name(left) in journal.finished:
                    need -= left.stat().st_size
                else:
                    left.unlink()
            free = shutil.disk_usage(partial).free
            if need > free:
                raise OutputError(
                    f"'{path.name}' needs {need / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left."
                )
            yield partial, journal
            for inside in [*partial.rglob("*"), partial]:
                sync(inside)
            if path.is_dir():
                path.rmdir()
            os.rename(partial, path)
            sync(path.parent)
            keep = False
        except KeyboardInterrupt:
            keep = key is not None
            raise
        finally:
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)
                Path(file.name).unlink(missing_ok=True)


def forget(path: Path) -> None:
    """Remove the journal of a run that was stopped when its folder had just got its name."""
    journal = path.with_name(f".{path.name}.journal")
    if journal.exists():
        with _errors_of(path), _locked(journal, path) as file:
            Path(file.name).unlink(missing_ok=True)


class Journal:
    """What a run has finished, in a file of one JSON document a line; a line is written when its file is safe on disk.

    Args:
        file: the journal's own.
        key: what the content depends on.
        folder: in which the run writes.

    Attributes:
        finished: BLAKE3 by name, of the files that are whole.
        measured: numbers over the model that were found, in the order of their graph; None if they were not kept.
    """

    def __init__(self, file: BinaryIO, key: Mapping[str, str], folder: Path) -> None:
        self._file, self._key, self._folder = file, {**key, "hash": ALGORITHM}, folder
        self._lock = threading.Lock()
        self.finished: dict[str, str] = {}
        self.measured: list[Tensor] | None = None

    def begin(self) -> None:
        """Forget what is there, and write down what this run depends on."""
        self._file.truncate(0)
        self._write({"key": self._key})

    def recover(self, path: Path) -> bool:
        """Whether there is something to go on from; a line that was not written whole counts as not written.

        Raises:
            OutputError: it was begun with another key.
        """
        self._file.seek(0)
        whole, lines = 0, []
        for line in self._file:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            whole += len(line)
        self._file.truncate(whole)
        if not lines:
            return False
        began = lines[0]["key"]
        other = [name for name in dict.fromkeys([*began, *self._key]) if began.get(name) != self._key.get(name)]
        if other:
            raise OutputError(
                f"what a stopped run left of '{path.name}' cannot be resumed: it was begun with another "
                f"{' and another '.join(other)}. Nothing was done. Without resuming, it is removed and the merge "
                "begins anew."
            )
        for line in lines[1:]:
            if "file" in line:
                self.finished[line["file"]] = line[ALGORITHM]
            else:
                self.measured = [_tensor(**one) for one in line["measured"]]
        _log.info("going on from %d finished files that a stopped run left", len(self.finished))
        return True

    def finish(self, file: Path, digest: str) -> None:
        """Note that a file is whole, once it is safe on disk."""
        sync(file)
        self.finished[self.name(file)] = digest
        self._write({"file": self.name(file), ALGORITHM: digest})

    def name(self, file: Path) -> str:
        """What a file is called here: its place in the folder."""
        return file.relative_to(self._folder).as_posix()

    def keep(self, numbers: Sequence[Tensor]) -> None:
        """Note measured numbers, unless they are too many to be worth it."""
        self.measured = list(numbers)
        if 0 < sum(n.numel() for n in numbers) <= _MOST_NUMBERS:
            self._write({"measured": [_plain(n) for n in numbers]})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def check_free(path: Path) -> None:
    """Nothing is at `path` but an empty folder, or nothing at all.

    Raises:
        OutputError: a file, a link, or a folder with content.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"'{path.name}' is a file or a link; name a new folder for the output.")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"'{path.name}' is not empty; nothing was written. Name a new folder, or delete this one.")


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is safe on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(partial: Path, path: Path) -> None:
    if partial.is_dir():
        _log.warning("removed what a stopped run had left of '%s'; resuming would have gone on from it", path.name)
        shutil.rmtree(partial)


@contextmanager
def _locked(journal: Path, path: Path) -> Iterator[BinaryIO]:
    """The journal, opened and held by this process alone; the lock goes with the process, however it ends."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = journal.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(
                f"another run is writing '{path.name}' now; wait for it, or name another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        if journal.exists() and os.path.samestat(os.fstat(file.fileno()), journal.stat()):
            break
        file.close()  # the run that held it has just ended and removed it
    with file:
        yield file


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as e:
        raise OutputError(f"'{path.name}' cannot be written: {e.strerror or e}. No folder was left there.") from e


def _plain(number: Tensor) -> dict[str, Any]:
    """A small tensor as JSON, exactly: a float's shortest decimal gives the same float back.

    >>> _tensor(**_plain(torch.tensor([[0.1, -0.0]])))
    tensor([[0.1000, -0.0000]])
    """
    return {
        "dtype": str(number.dtype).removeprefix("torch."),
        "shape": list(number.shape),
        "values": number.numpy(force=True).reshape(-1).tolist(),
    }


def _tensor(dtype: str, shape: Sequence[int], values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(tuple(shape))
