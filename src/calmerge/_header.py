"""The header of a safetensors file: what tensors it holds, and exactly where; checked whole before any is trusted.

The file is an 8-byte little-endian length N, N bytes of JSON, then the tensors, which cover the rest of the file
without holes and without overlaps. Whatever does not fit is one `CheckpointError`.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from calmerge._errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit that the format's own library has
MAX_DIMENSIONS = 64  # of what torch computes with
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_KEYS = {"dtype", "shape", "data_offsets"}
_OTHER_FORMATS = {
    b"version ": "it is a git-lfs pointer, not the file itself. Run 'git lfs pull' where it was cloned.",
    b"GGUF": "it is a quantised GGUF file. Use the original float16 or bfloat16 checkpoint.",
    b"PK\x03\x04": "it is a zip archive, as torch.save writes. Name it .pt or .bin, or save it as safetensors.",
    b"\x80\x02": "it is a pickle. Name it .pt or .bin, or save it as safetensors.",
    b"<": "it is a web page. Download the file itself.",
}


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: the format's name of its type, `BF16`; it may be one that is not in `BITS`.
        shape: as stored; entries lie in row-major order.
        start: where its bytes begin, counted from the start of the file.
        stop: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        tensors: by name, in the order of the names.
        metadata: texts by key.
        size: how many bytes the whole file has.
    """

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(file: Path) -> Header:
    """The header of a safetensors file; nothing behind it is read.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header does not describe it.

    >>> import tempfile; from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": torch.zeros(2, 3)}, Path(folder) / "model.safetensors")
    ...     read_header(Path(folder) / "model.safetensors").tensors
    {'w': Entry(dtype='F32', shape=(2, 3), start=72, stop=96)}
    """
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            first = f.read(8)
            length = _length(first, size)
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read ({e.strerror}).") from None
    except _Fault as e:
        raise _refusal(file, e) from None
    return parse_header(text, size, file)


def parse_header(text: bytes, size: int, file: Path) -> Header:
    """The header that `text`, the JSON of a file of `size` bytes, stands for.

    Raises:
        CheckpointError: as `read_header`; it names `file`.

    >>> text = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    >>> parse_header(text, 8 + len(text) + 8, Path("model.safetensors")).tensors["w"].shape
    (2,)
    >>> parse_header(text, 8 + len(text) + 4, Path("model.safetensors"))
    Traceback (most recent call last):
    calmerge._errors.CheckpointError: model.safetensors: not a readable safetensors file: tensor 'w' ends at byte 77, \
but the file has 73: it is truncated. Download or copy it again.
    """
    try:
        content = _json(text)
        begin = 8 + len(text)
        metadata = _metadata(content.pop("__metadata__", {}))
        tensors = {name: _entry(name, content[name], begin) for name in sorted(content)}
        _check_cover(tensors, begin, size)
    except _Fault as e:
        raise _refusal(file, e) from None
    return Header(tensors, metadata, size)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that stands there a second time.

    >>> repeated(["a", "b", "a"])
    'a'
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class _Fault(Exception):
    """What is wrong with a header, and what to do."""


def _refusal(file: Path, fault: _Fault) -> CheckpointError:
    return CheckpointError(f"{file}: not a readable safetensors file: {fault}")


def _length(first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or 8 + length > size:
        for magic, what in _OTHER_FORMATS.items():
            if first.startswith(magic):
                raise _Fault(what)
    if len(first) < 8:
        raise _Fault(f"it has {len(first)} bytes only. Download or copy it again.")
    if length > MAX_HEADER:
        raise _Fault(
            f"its first 8 bytes announce a header of {length} bytes; {MAX_HEADER} are the most. "
            "Is it a safetensors file? Download or save it again."
        )
    if 8 + length > size:
        raise _Fault(f"its header should end at byte {8 + length}, but the file has {size}. Download or copy it again.")
    return length


def _json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_float=_no_float, parse_constant=_no_float
        )
    except (ValueError, RecursionError) as e:
        raise _Fault(f"its header is no JSON ({_first_line(e)}). Download or save it again.") from None
    if not isinstance(content, dict):
        raise _Fault("its header is no JSON object. Download or save it again.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(key for key, _ in pairs)
    if twice is not None:
        raise _Fault(f"its header names {_quoted(twice)} twice. Save it again.")
    return dict(pairs)


def _no_float(text: str) -> None:
    raise _Fault(f"its header holds {text[:40]} where whole numbers belong. Save it again.")


def _metadata(given: Any) -> dict[str, str]:
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise _Fault("its __metadata__ must map names to texts. Save it again.")
    return given


def _entry(name: str, given: Any, begin: int) -> Entry:
    shown = _quoted(name)
    if not isinstance(given, dict) or not given.keys() >= _KEYS:
        raise _Fault(f"tensor {shown} lacks dtype, shape or data_offsets. Save it again.")
    if not _is_text(name):
        raise _Fault(f"the name {shown} is no valid Unicode. Save it again.")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str):
        raise _Fault(f"the type of tensor {shown} is no text. Save it again.")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**63:
        raise _Fault(f"the shape of tensor {shown} is impossible: {str(shape)[:60]}. Save it again.")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Fault(f"the offsets of tensor {shown} are impossible: {str(offsets)[:60]}. Save it again.")
    start, stop = offsets
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise _Fault(
            f"tensor {shown} of type {dtype} and shape {tuple(shape)} takes {math.prod(shape) * BITS[dtype] / 8:g} "
            f"bytes, but its offsets {start} to {stop} leave {stop - start}. Save it again."
        )
    return Entry(dtype, tuple(shape), begin + start, begin + stop)


def _is_text(name: str) -> bool:
    """Whether it can be written again; JSON's escapes can spell half a character."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def _counts(given: Any) -> bool:
    return isinstance(given, list) and all(type(n) is int and 0 <= n < 2**63 for n in given)


def _check_cover(tensors: dict[str, Entry], begin: int, size: int) -> None:
    """The tensors lie one behind the other, from the end of the header to the end of the file."""
    at, before = begin, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        shown = _quoted(name)
        if entry.start < at:
            raise _Fault(f"tensor {shown} begins at byte {entry.start}, inside {before}. Save it again.")
        if entry.start > at:
            raise _Fault(
                f"between {before} and tensor {shown} are {entry.start - at} bytes of no tensor. Save it again."
            )
        at, before = entry.stop, f"tensor {shown}"
        if at > size:
            raise _Fault(
                f"tensor {shown} ends at byte {at}, but the file has {size}: it is truncated. "
                "Download or copy it again."
            )
    if at < size:
        raise _Fault(f"behind {before} are {size - at} bytes of no tensor. Download or save it again.")


def _quoted(name: str) -> str:
    return f"'{name.encode('utf-8', 'replace').decode()[:200]}'"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
