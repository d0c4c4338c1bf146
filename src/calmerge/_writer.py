"""Writing weights as safetensors files, block by block: one file, or shards with their index."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._compiled import usable
from calmerge._folder import Journal
from calmerge._handles import kept_open
from calmerge._hash import Growing, hash_of
from calmerge._measure import ahead, pending, settle, workers, worthwhile
from calmerge._reader import Reader, Tapes
from calmerge._run import Run
from calmerge._size import bytes_of
from calmerge._weights import BLOCK, Stretch, Weights, experts_in, stretches

MANIFEST = "calmerge.json"
INDEX = "model.safetensors.index.json"
RECORDS = {MANIFEST, "expert.json", "report.json", "pretraining.json"}  # of how a folder came about; not its copies'
_SIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_weights(
    folder: Path,
    weights: Weights,
    *,
    shard: str | int = "5GB",
    chunk: int = BLOCK,
    threads: int | None = None,
    run: Run | None = None,
    journal: Journal | None = None,
) -> dict[str, str]:
    """The BLAKE3 of the files written: `model.safetensors`, or shards and `model.safetensors.index.json`.

    The bytes depend on the weights and on `shard` alone, not on `chunk` or `threads`. Held in memory: one chunk for
    each thread, and whatever computing one needs.

    Args:
        folder: an existing folder.
        weights: what to write; computed as it is written.
        shard: the most bytes that one file holds (a larger tensor stands alone), like "5GB" or "500MB".
        chunk: entries computed at a time.
        threads: how many chunks are computed at a time; as many as there are cores when None.
        run: progress in bytes.
        journal: of what is finished; files that it knows and that still have their hash are not written again.
    """
    return write_side_by_side({folder: weights}, shard=shard, chunk=chunk, threads=threads, run=run, journal=journal)[
        folder
    ]


def write_side_by_side(
    parts: Mapping[Path, Weights], *, shard: str | int = "5GB", chunk: int = BLOCK,
    threads: int | None = None, run: Run | None = None, journal: Journal | None = None,
) -> dict[Path, dict[str, str]]:  # fmt: skip
    """As `write_weights`, for several folders whose weights have the same names, shapes and types.

    Each block is computed for all of them before the next one, so that what they have in common is read once. Held in
    memory: one chunk of all of them for each thread.

    Args:
        parts: by folder, which must exist, its weights.
    """
    run = run or Run()
    first = next(iter(parts.values()))
    assert all(weights.specs == first.specs for weights in parts.values())
    files = shards(first, bytes_of(shard))
    threads = threads or os.cpu_count() or 1
    hashes: dict[Path, dict[str, str]] = {folder: {} for folder in parts}
    finishing: list[Future[None]] = []
    kept: Tapes = {}
    busy = worthwhile(threads, first.numel, len(first))
    with run.progress.track("writing", first.nbytes * len(parts), "B") as bar, workers(busy) as pool:
        paths = {file: [folder / file for folder in parts] for file in files}
        there = dict(zip(files, pool.map(lambda file: _still_whole(paths[file], journal), files), strict=True))
        if not all(there.values()):
            settle_kept(parts.values(), threads, run, journal)
        for file, names in files.items():
            found = there[file]
            if found:
                bar.advance(sum(first.specs[name].nbytes for name in names) * len(parts))
            else:
                here = dict(zip(paths[file], parts.values(), strict=True))
                found = _write_files(here, names, chunk, pool, bar, kept)
                if journal is not None:  # beside the next ones
                    finishing += [pool.submit(journal.finish, *one) for one in zip(here, found, strict=True)]
            for folder, one in zip(parts, found, strict=True):
                hashes[folder][file] = one
        for done in finishing:
            done.result()
    for folder, weights in parts.items():
        hashes[folder] |= _write_index(folder, weights, files)
    return hashes


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a line end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_side_files(source: Weights, folder: Path, *, dtype: torch.dtype | None = None) -> dict[str, str]:
    """The BLAKE3 by name of what lies around the weights of `source` and was copied, if it is a folder.

    That is configurations, tokenizer, chat templates, code, the licence, and the folders which `modules.json` names
    (pooling of a sentence encoder).

    Args:
        source: the base; its `edits` take the place of files of the same names.
        folder: where the copies go.
        dtype: of the weights that come out, for `config.json` to say; as it is when None.
    """
    place = source.folder
    copied: list[str] = []
    if place is not None:
        found = [file for file in sorted(place.iterdir()) if file.is_file() and _beside_weights(file)]
        for inner in [*_modules(place), "additional_chat_templates"]:
            found += sorted(f for f in (place / inner).rglob("*") if f.is_file())
        copied = [str(file.relative_to(place)) for file in found]
    for name in copied:
        if place is not None and name not in source.edits:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / name, folder / name)
    for name, content in source.edits.items():
        if content is not None:
            (folder / name).write_bytes(content)
    if dtype is not None and (folder / "config.json").is_file():
        _say_dtype(folder / "config.json", str(dtype).removeprefix("torch."))
    written = dict.fromkeys([*copied, *source.edits])
    return {name: hash_of(folder / name) for name in written if (folder / name).is_file()}


def _beside_weights(file: Path) -> bool:
    if file.name in RECORDS or file.name.endswith(".index.json"):
        return False
    return file.suffix in _SIDE or file.stem.upper() in {"LICENSE", "LICENCE", "NOTICE"}


def _modules(place: Path) -> list[str]:
    """The folders that the `modules.json` of a sentence encoder names."""
    try:
        paths = [str(module["path"]) for module in json.loads((place / "modules.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if path and Path(path).name == path and path != ".."]


def _say_dtype(config: Path, dtype: str) -> None:
    try:
        said = json.loads(config.read_text())
    except ValueError:
        return
    if isinstance(said, dict) and {"dtype", "torch_dtype"} & set(said):
        write_json(config, {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in said.items()})


def _write_index(folder: Path, weights: Weights, files: Mapping[str, list[str]]) -> dict[str, str]:
    """The index, where there are several files, and its BLAKE3."""
    if len(files) == 1:
        return {}
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map})
    return {INDEX: hash_of(folder / INDEX)}


def shards(weights: Weights, limit: int) -> dict[str, list[str]]:
    """The tensors of every file, where a file holds up to `limit` bytes or one tensor.

    >>> from calmerge import StateDict
    >>> list(shards(StateDict({"a": torch.zeros(2), "b": torch.zeros(2)}), 8).values())
    [['a'], ['b']]
    """
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


def _still_whole(paths: Sequence[Path], journal: Journal | None) -> list[str]:
    """The hashes of files that were finished before and are as the journal says; none unless all are."""
    said = [] if journal is None else [journal.finished.get(journal.name(path), "") for path in paths]
    if not said or not all(said):
        return []
    now = [hash_of(path) if path.is_file() else "" for path in paths]
    return now if now == said else []


def settle_kept(weights: Iterable[Weights], threads: int, run: Run, journal: Journal | None) -> None:
    """Find the numbers that weights depend on, or take those which a stopped run had found."""
    weights = list(weights)
    waiting = pending(weights)
    if journal is not None and journal.measured is not None and len(journal.measured) == len(waiting):
        for measure, number in zip(waiting, journal.measured, strict=True):
            measure.settle_as(number)
    settle(weights, threads=threads, run=run)
    if journal is not None and journal.measured is None and waiting:
        journal.keep([measure.value() for measure in waiting])


def _write_files(
    parts: Mapping[Path, Weights], names: list[str], chunk: int, pool: ThreadPoolExecutor, bar: Any, kept: Tapes
) -> list[str]:
    """Write files of one layout, block by block; a block of all of them is computed together. The BLAKE3 of each."""
    weights = next(iter(parts.values()))
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
    head = struct.pack("<Q", len(text)) + text
    chosen = {path: whole.only_names(names) for path, whole in parts.items()}
    with ExitStack() as stack:
        handles = []
        for path in chosen:
            f = stack.enter_context(path.open("w+b"))
            f.write(head)
            f.truncate(len(head) + end)
            f.flush()
            handles.append(f.fileno())
        hashing = [Growing(handle) for handle in handles]
        reader = Reader(list(chosen.values()), taping=usable(weights.numel, experts_in(weights)), kept=kept)

        @kept_open()
        def place(stretch: Stretch) -> int:
            size = 0
            for name, blocks in stretch:
                spec = weights.specs[name]
                row_bytes = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
                for rows, tensors in reader.each(name, blocks, together=len(blocks)):
                    start = len(head) + starts[name] + (rows.start or 0) * row_bytes
                    for handle, tensor in zip(handles, tensors, strict=True):
                        view, at = _raw(tensor), start
                        size += len(view)
                        while len(view):
                            written = os.pwrite(handle, view, at)
                            view, at = view[written:], at + written
            return size

        done = len(head)
        for written in ahead(pool, place, stretches(next(iter(chosen.values())), chunk), 64):
            bar.advance(written)
            done += written // len(handles)
            for one in hashing:  # what is written lies in the cache
                one.upto(done)
        return [one.found() for one in hashing]


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
