"""Headers of safetensors files: read exactly, and every fault named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from calmerge import CheckpointError, open_checkpoint
from calmerge._header import BITS, MAX_HEADER, Entry, Header, parse_header, read_header

W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
FILE = Path("model.safetensors")


def file_of(header: Any, data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def refusal(content: bytes, folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(folder)
    prefix = f"{folder / 'model.safetensors'}: not a readable safetensors file: "
    assert str(e.value).startswith(prefix)
    return str(e.value).removeprefix(prefix)


def test_a_header_says_types_shapes_and_places(tmp_path: Path) -> None:
    header = {"b": W, "a": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]}, "__metadata__": {"format": "pt"}}
    (tmp_path / "m").write_bytes(file_of(header, 26))
    begin = 8 + len(json.dumps(header))
    found = read_header(tmp_path / "m")
    assert found.tensors == {
        "a": Entry("BF16", (), begin + 24, begin + 26),
        "b": Entry("F32", (2, 3), begin, begin + 24),
    }
    assert list(found.tensors) == ["a", "b"]
    assert found.metadata == {"format": "pt"}
    assert found.size == begin + 26


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_type_of_the_format_is_listed(dtype: str, tmp_path: Path) -> None:
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, BITS[dtype]]}
    (tmp_path / "model.safetensors").write_bytes(file_of({"w": entry}, BITS[dtype]))
    weights: Any = open_checkpoint(tmp_path)
    assert list(weights.entries) == ["w"]
    assert list(weights.specs) == ([] if dtype in {"F4", "F6_E2M3", "F6_E3M2"} else ["w"])
    assert weights.foreign == ({"w": dtype} if dtype in {"F4", "F6_E2M3", "F6_E3M2"} else {})


def test_a_type_of_the_future_is_listed(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(file_of({"w": {"dtype": "Q3", "shape": [8], "data_offsets": [0, 3]}}, 3))
    assert read_header(tmp_path / "m").tensors["w"].dtype == "Q3"


def test_tensors_without_entries_take_no_bytes(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]},
        "w": W,
        "z": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]},
    }
    (tmp_path / "model.safetensors").write_bytes(file_of(header, 24))
    assert open_checkpoint(tmp_path)["z"].shape == (0,)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes only. Download or copy it again."),
        (b"\1\0\0", "it has 3 bytes only."),
        (struct.pack("<Q", MAX_HEADER + 1), f"announce a header of {MAX_HEADER + 1} bytes; {MAX_HEADER} are the most."),
        (b"\xff" * 16, "announce a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 500) + b"{}", "its header should end at byte 508, but the file has 10."),
        (file_of(b"", 0), "its header is no JSON (Expecting value"),
        (file_of(b'{"w": ', 4), "its header is no JSON (Expecting value"),
        (file_of(b"\xff\xfe", 4), "its header is no JSON ('utf-8' codec can't decode"),
        (file_of(b"{} x", 4), "its header is no JSON (Extra data"),
        (file_of(b"[" * 100_000, 4), "its header is no JSON (maximum recursion depth exceeded"),
        (file_of(b'{"w": ' + b"9" * 5000 + b"}", 4), "its header is no JSON (Exceeds the limit"),
        (file_of(b"[]", 0), "its header is no JSON object."),
        (file_of(b'{"w": NaN}', 0), "its header holds NaN where whole numbers belong."),
        (file_of(b'{"w": {}, "w": {}}', 0), "its header names 'w' twice."),
        (file_of(b'{"w": {"dtype": "F32", "dtype": "F16"}}', 0), "its header names 'dtype' twice."),
        (file_of({"__metadata__": {"a": 1}}, 0), "its __metadata__ must map names to texts."),
        (file_of({"w": [1]}, 0), "tensor 'w' lacks dtype, shape or data_offsets."),
        (file_of({"w": {"dtype": "F32", "shape": [1]}}, 0), "tensor 'w' lacks dtype, shape or data_offsets."),
        (file_of({"\ud800": W}, 24), "the name '?' is no valid Unicode."),
        (file_of({"w": {**W, "dtype": 3}}, 24), "the type of tensor 'w' is no text."),
        (file_of({"w": {**W, "shape": [2, -3]}}, 24), "the shape of tensor 'w' is impossible: [2, -3]."),
        (file_of({"w": {**W, "shape": [True, 6]}}, 24), "the shape of tensor 'w' is impossible: [True, 6]."),
        (file_of({"w": {**W, "shape": 6}}, 24), "the shape of tensor 'w' is impossible: 6."),
        (file_of({"w": {**W, "shape": [2**62, 2**62, 0]}}, 24), "the shape of tensor 'w' is impossible"),
        (file_of({"w": {**W, "shape": [2, 3] + [1] * 63}}, 24), "the shape of tensor 'w' is impossible"),
        (file_of({"w": {**W, "data_offsets": [24, 0]}}, 24), "the offsets of tensor 'w' are impossible: [24, 0]."),
        (file_of({"w": {**W, "data_offsets": [0, 24, 30]}}, 24), "the offsets of tensor 'w' are impossible"),
        (file_of({"w": {**W, "data_offsets": [-1, 23]}}, 24), "the offsets of tensor 'w' are impossible: [-1, 23]."),
        (file_of(b'{"w": {"data_offsets": [0, 24.0]}}', 24), "its header holds 24.0 where whole numbers belong."),
        (
            file_of({"w": {**W, "shape": [2, 4]}}, 24),
            "tensor 'w' of type F32 and shape (2, 4) takes 32 bytes, but its offsets 0 to 24 leave 24.",
        ),
        (file_of({"w": W}, 23), "but the file has 96: it is truncated. Download or copy it again."),
        (file_of({"w": W}, 25), "behind tensor 'w' are 1 bytes of no tensor."),
        (file_of({}, 1), "behind the header are 1 bytes of no tensor."),
        (file_of({"w": {**W, "data_offsets": [8, 32]}}, 32), "between the header and tensor 'w' are 8 bytes of no"),
        (
            file_of({"a": W, "w": {**W, "data_offsets": [28, 52]}}, 52),
            "between tensor 'a' and tensor 'w' are 4 bytes of no tensor.",
        ),
        (file_of({"a": W, "w": {**W, "data_offsets": [20, 44]}}, 44), "inside tensor 'a'."),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer, not the file itself. Run 'git lfs"),
        (b"GGUF\3\0\0\0" + bytes(50), "it is a quantised GGUF file. Use the original float16 or bfloat16 checkpoint."),
        (b"PK\3\4" + b"\1" * 50, "it is a zip archive, as torch.save writes."),
        (b"<!DOCTYPE html><html>Not found", "it is a web page. Download the file itself."),
    ],
)  # fmt: skip
def test_every_fault_is_one_sentence_and_what_to_do(content: bytes, says: str, tmp_path: Path) -> None:
    assert says in refusal(content, tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read \(Too many levels of symbolic"):
        read_header(tmp_path / "model.safetensors")


WHOLE = save({"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(())}, {"k": "v"})


def read(content: bytes, folder: Path) -> Header | None:
    """What our reader makes of a file, and that the format's own library makes the same of it, or refuses it too."""
    file = folder / "model.safetensors"
    file.write_bytes(content)
    try:
        found = read_header(file)
    except CheckpointError:
        return None
    try:
        with safe_open(file, framework="pt") as theirs:
            assert list(found.tensors) == list(theirs.keys())
            for name, entry in found.tensors.items():
                part = theirs.get_slice(name)
                assert (tuple(part.get_shape()), part.get_dtype()) == (entry.shape, entry.dtype)
    except SafetensorError:  # stricter only in the types it knows and in how whole numbers are spelled
        assert b"-0" in content or any(e.dtype not in BITS for e in found.tensors.values())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else_happens(folder: Path, content: bytes) -> None:
    found = read(content, folder)
    assert found is None or not found.tensors


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_is_refused_or_read_as_it_says(folder: Path, damage: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for at, value in damage:
        content[at] = value
    read(bytes(content), folder)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(folder: Path, keep: int) -> None:
    assert read(WHOLE[:keep], folder) is None


@given(st.binary(min_size=1, max_size=50))
def test_a_file_with_more_behind_it_is_refused(folder: Path, more: bytes) -> None:
    assert read(WHOLE + more, folder) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "Q3"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), st.integers(0, 70))
def test_any_json_is_refused_or_describes_the_whole_file(folder: Path, header: dict[str, Any], data: int) -> None:
    content = file_of(header, data)
    found = read(content, folder)
    if found is not None:
        assert sum(e.stop - e.start for e in found.tensors.values()) == data
        assert found.tensors.keys() == header.keys() - {"__metadata__"}


SPECS = st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 3), max_size=3)), max_size=6)


@given(SPECS, st.randoms(use_true_random=False))
def test_what_a_sound_header_says_is_what_comes_out(specs: list[tuple[str, list[int]]], random: Any) -> None:
    header, at = {}, 0
    for i, (dtype, shape) in enumerate(specs):
        shape = [*shape, 8]
        stop = at + torch.Size(shape).numel() * BITS[dtype] // 8
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    names = list(header)
    random.shuffle(names)
    text = json.dumps({name: header[name] for name in names}).encode()
    found = parse_header(text, 8 + len(text) + at, FILE)
    begin = 8 + len(text)
    assert {n: [e.dtype, [*e.shape], [e.start - begin, e.stop - begin]] for n, e in found.tensors.items()} == {
        n: list(h.values()) for n, h in header.items()
    }


def test_a_header_of_many_tensors_is_read_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = {f"layers.{i}.w": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(20000)}
    (tmp_path / "m").write_bytes(file_of(header, 80000))
    assert len(read_header(tmp_path / "m").tensors) == 20000


def test_opening_touches_no_tensor(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """A file whose data are a hole of 1 TB opens at once."""
    size = 2**40
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + size)
    assert open_checkpoint(tmp_path).nbytes == size
