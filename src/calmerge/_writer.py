"""Writing a checkpoint folder: block by block, beside its final place, and moved there only when it is whole."""

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._checkpoint import Checkpoint, sha256
from calmerge._errors import OutputError, UsageError
from calmerge._measure import settle, workers
from calmerge._run import Run
from calmerge._weights import Weights, blocks

MANIFEST = "calmerge.json"
RECORDS = {MANIFEST, "expert.json", "report.json", "pretraining.json"}  # of how a folder came about; not its copies'
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@contextmanager
def new_folder(path: Path, *, need: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well, and is gone when it does not.

    Until the end it lies beside `path` under a name that starts with a dot, so that a killed run leaves nothing that
    looks finished.

    Args:
        path: must not exist, or be an empty folder.
        need: bytes that will be written; checked against the free space of the disk before anything is.

    Raises:
        OutputError: the place is taken, cannot be written, or is too small.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with new_folder(Path(place) / "merged") as folder:
    ...         _ = (folder / "a.txt").write_text("a")
    ...     sorted(p.name for p in (Path(place) / "merged").iterdir())
    ['a.txt']
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"'{path.name}' is a file or a link; name a new folder for the output.")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"'{path.name}' is not empty; nothing was written. Name a new folder, or delete this one.")
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    _clear_killed(path)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if need > free:
            raise OutputError(f"'{path.name}' needs {need / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left.")
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.is_dir():
            path.rmdir()
        os.rename(partial, path)
        _sync(path.parent)
    except OSError as e:
        if isinstance(e, OutputError):
            raise
        raise OutputError(f"'{path.name}' cannot be written: {e.strerror or e}. Nothing is left of it.") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_killed(path: Path) -> None:
    """Remove what runs that were killed left beside `path`; a folder whose process lives is not touched."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir():
            shutil.rmtree(left, ignore_errors=True)


def write_weights(
    folder: Path,
    weights: Weights,
    *,
    shard: str | int = "5GB",
    chunk: int = 2**18,
    threads: int | None = None,
    run: Run | None = None,
) -> dict[str, str]:
    """The SHA-256 of the files written: `model.safetensors`, or shards with `model.safetensors.index.json`.

    The bytes depend on the weights and on `shard` alone, not on `chunk` or `threads`. Held in memory: one chunk for
    each thread, and whatever computing one needs.

    Args:
        folder: an existing folder.
        weights: what to write; computed as it is written.
        shard: the most bytes that one file holds (a larger tensor stands alone), like "5GB" or "500MB".
        chunk: entries computed at a time.
        threads: how many chunks are computed at a time; as many as there are cores when None.
        run: progress in bytes.
    """
    run = run or Run()
    files = _plan(weights, _bytes(shard))
    threads = threads or os.cpu_count() or 1
    settle([weights], threads=threads, run=run)
    with run.progress.track("writing", weights.nbytes, "B") as bar, workers(threads) as pool:
        for file, names in files.items():
            _write_file(folder / file, weights, names, chunk, pool, bar)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": weights.nbytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_json(folder / "model.safetensors.index.json", index)
    with workers(threads) as pool:
        return dict(zip(files, pool.map(lambda f: sha256(folder / f), files), strict=True))


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a line end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_side_files(source: Weights, folder: Path) -> None:
    """The files around the weights (configurations, tokenizer, chat template), where the source has them."""
    if not isinstance(source, Checkpoint) or source.folder is None:
        return
    for file in sorted(source.folder.iterdir()):
        wanted = file.suffix in {".json", ".txt", ".model", ".jinja"} and not file.name.endswith(".index.json")
        if file.is_file() and wanted and file.name not in RECORDS:
            shutil.copyfile(file, folder / file.name)


def _plan(weights: Weights, limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in weights.specs.items():
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_file(path: Path, weights: Weights, names: list[str], chunk: int, pool: ThreadPoolExecutor, bar: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in names:
        spec = weights.specs[name]
        starts[name] = end
        header[name] = {
            "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]
        }  # fmt: skip
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = weights.only_names(names)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
        f.flush()

        def place(block: tuple[str, slice]) -> int:
            name, rows = block
            data = _raw(part.read(name, rows))
            spec = part.specs[name]
            row_bytes = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
            at = 8 + len(text) + starts[name] + (rows.start or 0) * row_bytes
            view = memoryview(data)
            while len(view):
                written = os.pwrite(f.fileno(), view, at)
                view, at = view[written:], at + written
            return len(data)

        for written in pool.map(place, blocks(part, chunk)):
            bar.advance(written)


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _bytes(size: str | int) -> int:
    """
    >>> _bytes("5GB"), _bytes("1.5 MB"), _bytes(100)
    (5000000000, 1500000, 100)
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)B\s*", size, re.IGNORECASE)
    if not match:
        raise UsageError(f"shard must be a size like 5GB or 500MB, got '{size}'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
