"""Opening checkpoints: headers at once, tensors when they are asked for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calmerge._errors import CheckpointError, MissingExtra, did_you_mean
from calmerge._handles import handle_of
from calmerge._hash import hash_of
from calmerge._header import Entry, read_header
from calmerge._pickled import SUFFIXES, load_pickled, pickled_entries
from calmerge._shards import check_index, read_index, shard_files
from calmerge._watch import Array, Stored, leaf
from calmerge._weights import ALL, Memo, Node, Spec, StateDict, Weights

Source = str | Path | Weights | Mapping[str, Tensor] | nn.Module

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_AGAIN = "Nothing of it can be trusted; start again once it is whole."
_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"}  # of a trainer


class Checkpoint(Weights):
    """Tensors in files: headers are read on opening, data when asked for.

    Args:
        files: the files, in order; a name may stand in one of them only.
        label: what error messages and reports call it.
        folder: where its side files (config, tokenizer) are; None for a single file.
        pickled: of files that are not safetensors, where the tensors of each lie.

    Attributes:
        entries: by name, the number of the tensor's file in `files`, and where in it the tensor lies.
        foreign: by name, the stored type of tensors that torch has no type for (`F4`); they are not in `specs`.
    """

    def __init__(
        self, files: list[Path], *, label: str, folder: Path | None = None,
        pickled: Sequence[Mapping[str, Entry]] | None = None,
    ) -> None:  # fmt: skip
        self.files, self.label, self.folder = files, label, folder
        self.entries: dict[str, tuple[int, Entry]] = {}
        for number, file in enumerate(files):
            held = read_header(file).tensors if pickled is None else pickled[number]
            for name, entry in held.items():
                if name in self.entries:
                    first = files[self.entries[name][0]].name
                    raise CheckpointError(
                        f"{label}: tensor '{name}' stands in two files, {first} and {file.name}. "
                        "Remove the one that does not belong, or save the model again."
                    )
                self.entries[name] = number, entry
        self.specs = {
            name: Spec(entry.shape, _DTYPES[entry.dtype])
            for name, (_, entry) in self.entries.items()
            if entry.dtype in _DTYPES
        }
        self.foreign = {name: e.dtype for name, (_, e) in self.entries.items() if name not in self.specs}
        self._states = [_state(file.stat()) for file in files]
        self._hashes: dict[Path, str] = {}

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The tensor, or some rows of it, straight from the file.

        Raises:
            CheckpointError: the file was cut short, replaced or taken away since it was opened.
        """
        key = (id(self), name, rows.start, rows.stop)
        if memo is not None and key in memo:
            return memo[key]
        number, entry = self.entries[name]
        shape, dtype = self.specs[name]
        start, stop = entry.start, entry.stop
        row = (stop - start) // max(1, shape[0]) if shape else 0
        if rows != ALL:
            first, last, _ = rows.indices(shape[0])
            start, stop, shape = start + first * row, start + max(first, last) * row, (max(0, last - first), *shape[1:])
        data = np.empty(stop - start, np.uint8)
        self.fill(memoryview(data), number, start)  # type: ignore[arg-type]
        tensor = torch.frombuffer(data, dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)
        leaf(tensor, (start - entry.start) // dtype.itemsize, _Rows(self, number, entry.start, row))
        if memo is not None:
            memo[key] = tensor
        return tensor

    def parts(self, name: str) -> Sequence[Node]:
        """None: it lies in a file."""
        return ()

    def fill(self, rest: memoryview, number: int, at: int) -> None:
        """Bytes of a file, read and not mapped: a mapped file that shrinks ends the process, whatever was checked.

        Args:
            rest: where they go.
            number: of the file in `files`.
            at: the first byte.

        Raises:
            CheckpointError: the file was cut short, replaced or taken away since its header was read.
        """
        file = self.files[number]
        with handle_of((id(self), number), lambda: self.open(number)) as handle:
            try:
                while rest:
                    got = os.preadv(handle, [rest], at)
                    if not got:
                        raise CheckpointError(f"{file}: was cut short while it was in use. {_AGAIN}")
                    rest, at = rest[got:], at + got
            except OSError as e:
                raise CheckpointError(f"{file}: cannot be read any more ({e.strerror}). {_AGAIN}") from None

    def open(self, number: int) -> int:
        """The file of that number, opened for reading and to be closed soon.

        That it is still the same is asked each time, so that no two states of it are mixed. It is not kept open for
        longer than a stretch of tensors takes: experts may have more shards than a process may have files.

        Raises:
            CheckpointError: it was replaced or taken away since its header was read.
        """
        file = self.files[number]
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read any more ({e.strerror}). {_AGAIN}") from None
        if _state(os.fstat(handle)) != self._states[number]:
            os.close(handle)
            raise CheckpointError(f"{file}: was changed while it was in use. {_AGAIN}")
        return handle

    @property
    def fingerprint(self) -> str:
        """Sizes and times of the files."""
        return ",".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in self.files)

    @property
    def hashes(self) -> dict[str, str]:
        """BLAKE3 by file name."""
        return {file.name: self.hash(file) for file in self.files}

    def hash(self, file: Path) -> str:
        """BLAKE3 of one of its files, found once.

        Raises:
            CheckpointError: the file was taken away.
        """
        if file not in self._hashes:
            try:
                self._hashes[file] = hash_of(file)
            except OSError as e:
                raise CheckpointError(f"{file}: cannot be read any more ({e.strerror}). {_AGAIN}") from None
        return self._hashes[file]


@dataclass(frozen=True)
class _Rows(Stored):
    """How a tape reads a tensor that begins at byte `start` of a file, with `row` bytes a row."""

    checkpoint: Checkpoint
    number: int
    start: int
    row: int

    def __call__(self, rows: slice, offset: int, into: Array) -> Array:
        self.checkpoint.fill(memoryview(into), self.number, self.first(rows))  # type: ignore[arg-type]
        return into

    def of(self, name: str) -> "_Rows":
        number, entry = self.checkpoint.entries[name]
        return _Rows(self.checkpoint, number, entry.start, self.row)

    def open(self) -> int:
        return self.checkpoint.open(self.number)

    def first(self, rows: slice) -> int:
        return self.start + (rows.start or 0) * self.row


def open_checkpoint(source: Source, *, revision: str | None = None) -> Weights:
    """The weights behind `source`, lazily.

    Args:
        source: a safetensors file; a folder with `model.safetensors`, with shards and their index, or with one
            safetensors file; a PEFT folder (its adapter, which needs a base: see `adapted`); a `.pt` or `.bin` file of
            plain tensors (unpickled with `weights_only=True`, so no pickled code runs); a hub id such as
            `google/vit-base`, also as `id@revision`; a mapping of tensors; a module.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
        MissingExtra: a hub id without `huggingface_hub`.

    >>> open_checkpoint({"w": torch.ones(2)})["w"]
    tensor([1., 1.])
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _from_mapping(_untied(source))
    if isinstance(source, Mapping):
        return _from_mapping(source)
    path = Path(source).expanduser()
    if path.is_file() and path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").is_file():
        path = path.parent  # factors mean nothing without their scale
    if path.is_dir():
        return _open_folder(path, str(source))
    if path.is_file():
        return _open_file(path, str(source))
    if _is_hub_id(str(source)):
        return _open_folder(_download(str(source), revision), str(source))
    raise CheckpointError(
        f"no checkpoint at '{source}': expected a safetensors file, a folder, or a hub id like org/name.{_beside(path)}"
    )


def _beside(path: Path) -> str:
    """What is there under a similar name."""
    try:
        close = did_you_mean(path.name, [p.name for p in path.parent.iterdir() if not p.name.startswith(".")])
    except OSError:
        return ""
    return f" {close}" if close.startswith("Did") else ""


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is replaced, cut short or written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors with each shared one under its first name only."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    return tensors


def _from_mapping(tensors: Mapping[str, Tensor]) -> StateDict:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"'{name}' is a {type(tensor).__name__}; a checkpoint holds tensors only.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "without data" if tensor.is_meta else "sparse"
            raise CheckpointError(f"'{name}' is {kind}; expected a dense tensor of numbers. Save it as one.")
    return StateDict(tensors)


def _open_folder(folder: Path, label: str) -> Weights:
    extra = [f for f in [folder / "head.safetensors"] if f.is_file()]
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if (folder / "adapter_config.json").is_file() and not index.is_file() and not whole.is_file():
        return _open_adapter(folder, label)
    if index.is_file():
        weight_map = read_index(index)
        files = shard_files(index, weight_map)
        if whole.is_file() and whole not in files:
            raise CheckpointError(
                f"'{label}' holds model.safetensors, and an index that names other files. One of them is left from "
                "another model; remove it."
            )
        checkpoint = Checkpoint(files + extra, label=label, folder=folder)
        held: dict[str, set[str]] = {file.name: set() for file in files}
        for name, (number, _) in checkpoint.entries.items():
            if number < len(files):
                held[files[number].name].add(name)
        check_index(index, weight_map, held)
        return checkpoint
    if whole.is_file():
        return Checkpoint([whole, *extra], label=label, folder=folder)
    files = sorted(f for f in folder.glob("*.safetensors") if f not in extra)
    if len(files) == 1:
        return Checkpoint(files + extra, label=label, folder=folder)
    if len(files) > 1:
        raise CheckpointError(
            f"'{label}' holds {len(files)} safetensors files and no model.safetensors.index.json that says which "
            "belong together. Name the one file, or save the model again."
        )
    opened = _open_pickled_folder(folder, label)
    opened.folder = folder
    return opened


def _open_pickled_folder(folder: Path, label: str) -> Checkpoint | StateDict:
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        weight_map = read_index(index)
        shards = shard_files(index, weight_map)
        lying = [entries for file in shards if (entries := pickled_entries(file, _NAMES)) is not None]
        if len(lying) < len(shards):
            parts = {file.name: load_pickled(file) for file in shards}
            check_index(index, weight_map, parts)
            return _from_mapping({name: parts[file][name] for name, file in weight_map.items()})
        held = {file.name: entries for file, entries in zip(shards, lying, strict=True)}
        check_index(index, weight_map, held)
        named = [{n: e for n, e in held[f.name].items() if weight_map.get(n) == f.name} for f in shards]
        return Checkpoint(shards, label=label, pickled=named)
    if (folder / "pytorch_model.bin").is_file():
        return _open_file(folder / "pytorch_model.bin", label)
    for pattern in ("*.bin", "*.pt"):
        files = sorted(f for f in folder.glob(pattern) if f.name not in _NO_WEIGHTS)
        if len(files) == 1:
            return _open_file(files[0], label)
        if files:
            raise CheckpointError(
                f"'{label}' holds {len(files)} {pattern} files and no pytorch_model.bin.index.json that says which "
                "belong together. Name the one file, or save the model again."
            )
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"'{label}' holds quantised GGUF files only. Use the original float16 or bfloat16 checkpoint."
        )
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"'{label}' holds no weights (*.safetensors, *.bin or *.pt); found {found}.")


def _open_adapter(folder: Path, label: str) -> Weights:
    from calmerge._adapter_config import load_config
    from calmerge._lora import Adapter

    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return Adapter(_open_file(folder / name, label), load_config(folder, label))
    raise CheckpointError(f"'{label}' holds adapter_config.json but no weights; expected adapter_model.safetensors.")


def _open_file(path: Path, label: str) -> Checkpoint | StateDict:
    if path.suffix not in SUFFIXES:
        return Checkpoint([path], label=label)
    entries = pickled_entries(path, _NAMES)
    return _from_mapping(load_pickled(path)) if entries is None else Checkpoint([path], label=label, pickled=[entries])


def _is_hub_id(source: str) -> bool:
    parts = source.partition("@")[0].split("/")
    return len(parts) == 2 and all(p and not p.startswith(".") for p in parts)


def _download(source: str, revision: str | None) -> Path:
    name, _, at = source.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "hf") from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or at or None,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            )
        )
    except Exception as e:
        raise CheckpointError(
            f"'{source}' is neither a path nor a hub id that can be fetched ({type(e).__name__}: {e})."
        ) from None
