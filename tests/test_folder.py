"""Folders that appear when they are whole, and runs that go on from what a stopped one had finished."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import calmerge as cm
from calmerge import OutputError, StateDict, TaskVectors, UsageError, Weights
from calmerge._folder import new_folder, resumable_folder
from calmerge._random import uniform

RECIPE = {"merge": ["ties"]}


def weights() -> StateDict:
    return StateDict({name: uniform((40, 5), name) for name in "abcde"})


@pytest.fixture
def inputs(tmp_path: Path) -> TaskVectors:
    for name in ("base", "x", "y"):
        (tmp_path / name).mkdir()
        tensors = {tensor: uniform((40, 5), name, tensor) for tensor in "abcde"}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return cm.task_vectors(tmp_path / "base", {t: tmp_path / t for t in ("x", "y")})


def stopping_at(name: str, delta: Weights, stop: Callable[[], BaseException] = KeyboardInterrupt) -> Weights:
    """The same delta, which stops the run when one tensor is asked for."""

    def fn(tensor: Tensor, site: cm._weights.Site) -> Tensor:
        if site.name == name:
            raise stop()
        return tensor

    return delta.map(fn)


def save(path: Path, tvs: TaskVectors, delta: Weights | cm.Merged, **options: object) -> None:
    cm.save(path, tvs, delta, shard=1000, recipe=RECIPE, threads=1, **options)  # type: ignore[arg-type]


def stop(path: Path, tvs: TaskVectors, name: str = "d") -> None:
    """A run that is stopped with a to c finished (one tensor is a shard)."""
    with pytest.raises(KeyboardInterrupt):
        save(path, tvs, stopping_at(name, cm.ties(tvs)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


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
    while not list(tmp_path.glob(".out.partial/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.") for p in tmp_path.iterdir())


def test_a_stopped_run_goes_on_with_the_same_bytes(inputs: TaskVectors, tmp_path: Path) -> None:
    save(tmp_path / "unbroken", inputs, cm.ties(inputs))
    stop(tmp_path / "out", inputs)
    assert not (tmp_path / "out").exists()
    journal = [json.loads(line) for line in (tmp_path / ".out.journal").read_text().splitlines()]
    assert [line["file"] for line in journal if "file" in line] == [
        f"model-0000{i}-of-00005.safetensors" for i in "123"
    ]
    # finished tensors are not computed again, nor are thresholds measured again
    save(tmp_path / "out", inputs, stopping_at("b", cm.ties(inputs), AssertionError), resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert not list(tmp_path.glob(".out*"))


def test_measured_thresholds_are_kept(inputs: TaskVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "unbroken", inputs, cm.ties(inputs))
    stop(tmp_path / "out", inputs)
    merged = cm.ties(inputs)
    with monkeypatch.context() as patch:
        patch.setattr("calmerge._measure._side_by_side", lambda *_, **__: pytest.fail("measured again"))
        save(tmp_path / "out", inputs, merged, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_a_merge_with_patches_goes_on_with_the_same_bytes(
    inputs: TaskVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "unbroken", inputs, cm.emr(inputs))
    merged = cm.emr(inputs)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", inputs, replace(merged, shared=stopping_at("d", merged.shared)))
    journal = [json.loads(line) for line in (tmp_path / ".out.journal").read_text().splitlines()]
    assert [line["file"] for line in journal if "file" in line] == [
        *(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)),
        *(f"shared/model-0000{i}-of-00005.safetensors" for i in range(1, 4)),
    ]
    again = cm.emr(inputs)
    again = replace(again, shared=stopping_at("b", again.shared, AssertionError))
    with monkeypatch.context() as patch:
        patch.setattr("calmerge._measure._side_by_side", lambda *_, **__: pytest.fail("measured again"))
        save(tmp_path / "out", inputs, again, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_a_shard_that_changed_since_is_written_again(inputs: TaskVectors, tmp_path: Path) -> None:
    save(tmp_path / "unbroken", inputs, cm.ties(inputs))
    stop(tmp_path / "out", inputs)
    shard = tmp_path / ".out.partial" / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    save(tmp_path / "out", inputs, cm.ties(inputs), resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


@pytest.mark.parametrize("torn", [0, 1, 20, 10_000])
def test_a_journal_that_was_cut_short_is_read_as_far_as_it_goes(torn: int, inputs: TaskVectors, tmp_path: Path) -> None:
    save(tmp_path / "unbroken", inputs, cm.ties(inputs))
    stop(tmp_path / "out", inputs)
    journal = tmp_path / ".out.journal"
    journal.write_bytes(journal.read_bytes()[: max(0, journal.stat().st_size - torn)])
    save(tmp_path / "out", inputs, cm.ties(inputs), resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_a_second_stop_keeps_what_both_runs_finished(inputs: TaskVectors, tmp_path: Path) -> None:
    save(tmp_path / "unbroken", inputs, cm.ties(inputs))
    stop(tmp_path / "out", inputs, "b")
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", inputs, stopping_at("e", cm.ties(inputs)), resume=True)
    save(tmp_path / "out", inputs, stopping_at("c", cm.ties(inputs), AssertionError), resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_a_failure_of_a_resumed_run_keeps_what_was_finished_before(inputs: TaskVectors, tmp_path: Path) -> None:
    stop(tmp_path / "out", inputs)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "out", inputs, stopping_at("d", cm.ties(inputs), ZeroDivisionError), resume=True)
    save(tmp_path / "out", inputs, stopping_at("b", cm.ties(inputs), AssertionError), resume=True)


def test_without_resume_a_stopped_run_is_removed_and_told(
    inputs: TaskVectors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop(tmp_path / "out", inputs)
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "out", inputs, cm.ties(inputs))
    assert "removed what a stopped run had left of 'out'; resuming would have gone on from it" in caplog.text
    assert not list(tmp_path.glob(".out*"))


def test_resume_with_nothing_to_go_on_from_begins(inputs: TaskVectors, tmp_path: Path) -> None:
    save(tmp_path / "out", inputs, cm.ties(inputs), resume=True)
    assert (tmp_path / "out" / "calmerge.json").is_file()


@pytest.mark.parametrize("changed", ["recipe", "expert 'y'", "dtype", "shard size"])
def test_another_merge_does_not_resume(changed: str, inputs: TaskVectors, tmp_path: Path) -> None:
    stop(tmp_path / "out", inputs)
    before = content(tmp_path / ".out.partial")
    options: dict[str, object] = {"recipe": RECIPE, "shard": 1000}
    if changed == "recipe":
        options["recipe"] = {"merge": ["average"]}
    elif changed == "dtype":
        options["dtype"] = torch.bfloat16
    elif changed == "shard size":
        options["shard"] = 2000
    else:
        os.utime(tmp_path / "y" / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=f"of 'out' cannot be resumed: it was begun with another {changed}. Nothing"):
        cm.save(tmp_path / "out", inputs, cm.ties(inputs), resume=True, **options)  # type: ignore[arg-type]
    assert content(tmp_path / ".out.partial") == before


def test_resume_needs_the_recipe(inputs: TaskVectors, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resume needs the recipe"):
        cm.save(tmp_path / "out", inputs, cm.ties(inputs), resume=True)


def test_two_runs_never_fill_the_same_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom calmerge._folder import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'first').write_text('1')\n    print('go', flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        for resume in (False, True):
            with (
                pytest.raises(OutputError, match="another run is writing 'out' now"),
                resumable_folder(tmp_path / "out", resume=resume),
            ):
                raise AssertionError("never entered")
        first.communicate(b"end\n")
    assert first.returncode == 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["first", "out"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("out", "dangling"):
        with pytest.raises(OutputError, match=f"'{name}' is a file or a link"), new_folder(tmp_path / name):
            raise AssertionError("never entered")


@pytest.mark.parametrize("name", ["base", "x"])
def test_an_output_inside_an_input_is_refused(name: str, inputs: TaskVectors, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the output would lie inside"):
        cm.save(tmp_path / name / "merged", inputs, cm.ties(inputs))
    assert os.listdir(tmp_path / name) == ["model.safetensors"]
