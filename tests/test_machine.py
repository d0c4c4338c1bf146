"""The machine by itself: strips, files, what it finds, and that one program does not end another."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from calmerge._machine import (
    ADD,
    DIV,
    FINITE,
    LEAST,
    LOAD_BF16,
    LOAD_F32,
    MOST,
    MUL,
    NOT_FINITE,
    SIGN,
    SOUND,
    STORE_BF16,
    STORE_F32,
    STRIP,
    UNREADABLE,
    Load,
    Player,
    Step,
    player,
)


def play(
    program: Player, inputs: list[np.ndarray], out: np.ndarray, constants: list[float], files: list[tuple[int, int]]
) -> int:
    arrays = [
        np.array([x.ctypes.data for x in inputs], np.int64), np.array([out.ctypes.data], np.int64),
        np.array(constants, np.float32),
    ]  # fmt: skip
    places = [np.array([f[i] for f in files], np.int64) for i in (0, 1)]
    return program(*(x.ctypes.data for x in arrays), 0, len(out), *(x.ctypes.data for x in places))


def test_strips_of_a_file_and_of_memory_meet(tmp_path: Path) -> None:
    n = 2 * STRIP + 5
    stored = (np.arange(n) % 128).astype(np.float32)
    (tmp_path / "f").write_bytes(b"head" + (stored.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    held = np.arange(n, dtype=np.float32)
    program = Player(
        [Load(LOAD_BF16, 2), Load(LOAD_F32, 0)], [True], [Step(MUL, 3, 0, 2), Step(ADD, 4, 3, 1)], [(STORE_F32, 4)]
    )
    room, out = np.empty(STRIP, np.uint16), np.empty(n, np.float32)
    file = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        assert play(program, [room, held], out, [10.0], [(file, 4)]) == SOUND
        assert np.array_equal(out, 10 * stored + held)
        assert play(program, [room, held], out, [10.0], [(file, 6)]) == UNREADABLE
    finally:
        os.close(file)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_entry_that_is_no_number_is_told_wherever_it_is(bad: float) -> None:
    program = Player([Load(LOAD_F32, 0)], [], [Step(FINITE, 0, 0), Step(ADD, 1, 0, 0)], [(STORE_F32, 1)])
    for at in (0, STRIP - 1, STRIP, 2 * STRIP + 2):
        x = np.ones(2 * STRIP + 3, np.float32)
        assert play(program, [x], np.empty_like(x), [], []) == SOUND
        x[at] = bad
        assert play(program, [x], np.empty_like(x), [], []) == NOT_FINITE


def test_the_end_of_one_program_is_not_that_of_another() -> None:
    x, out = np.ones(8, np.float32), np.empty(8, np.float32)
    stays = Player([Load(LOAD_F32, 0)], [], [Step(ADD, 1, 0, 0)], [(STORE_F32, 1)])
    for _ in range(3):
        goes = Player([Load(LOAD_F32, 0)], [], [Step(MUL, 1, 0, 0)], [(STORE_F32, 1)])
        assert play(goes, [x], out, [], []) == SOUND
        del goes
        gc.collect()
    assert play(stays, [x], out, [], []) == SOUND
    assert out.tolist() == [2.0] * 8


def test_tensors_that_are_treated_alike_share_a_program() -> None:
    same = [player((Load(LOAD_F32, 0),), (True,), (Step(MUL, 2, 0, 1),), ((STORE_F32, 2),)) for _ in range(2)]
    assert same[0] is same[1]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("op", [LEAST, MOST])
def test_the_lesser_and_the_greater_with_a_number_that_may_be_nan(op: int, known: bool) -> None:
    bound = 0.5 if known else np.nan
    x = np.array([-2.0, 0.5, 3.0, np.nan, np.inf, -0.0] * 6, np.float32)
    program = Player([Load(LOAD_F32, 0)], [known], [Step(op, 2, 1, 0)], [(STORE_F32, 2)])
    out = np.empty_like(x)
    assert play(program, [x], out, [bound], []) == SOUND
    wanted = torch.minimum if op == LEAST else torch.maximum
    assert np.array_equal(out, wanted(torch.from_numpy(x), torch.tensor(bound)).numpy(), equal_nan=True)


def test_signs_are_those_of_torch() -> None:
    x = np.array([-2.0, 0.0, -0.0, 3.0, np.nan, np.inf, -np.inf, 1e-45] * 5, np.float32)
    program = Player([Load(LOAD_F32, 0)], [], [Step(SIGN, 1, 0)], [(STORE_F32, 1)])
    out = np.empty_like(x)
    assert play(program, [x], out, [], []) == SOUND
    assert out.tobytes() == torch.from_numpy(x).sign().numpy().tobytes()


@pytest.mark.parametrize("checked", [True, False])
def test_bfloat16_is_rounded_as_torch_does_whether_or_not_an_entry_may_be_nan(checked: bool) -> None:
    x = np.concatenate([np.arange(-3, 3, 1 / 512), [65535 * 2.0**112, 1e-40, -0.0]]).astype(np.float32)
    if not checked:
        x = np.append(x, np.float32([np.nan, np.inf, -np.inf]))
    steps = [Step(FINITE, 0, 0)] if checked else [Step(DIV, 2, 0, 1)]
    program = Player([Load(LOAD_F32, 0)], [True], steps, [(STORE_BF16, 0 if checked else 2)])
    out = np.empty(len(x), np.int16)
    assert play(program, [x], out, [1.0], []) == SOUND
    made, wanted = torch.from_numpy(out).view(torch.bfloat16), torch.from_numpy(x).bfloat16()
    assert torch.equal(made.isnan(), wanted.isnan())  # of which torch has two
    assert torch.equal(made.view(torch.int16)[~made.isnan()], wanted.view(torch.int16)[~made.isnan()])
