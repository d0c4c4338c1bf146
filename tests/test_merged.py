"""A model for each task: packed masks in any block, the folder and back, and what it costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from calmerge import (
    CheckpointError,
    Merged,
    StateDict,
    UsageError,
    add,
    emr,
    export,
    merge,
    open_checkpoint,
    open_merged,
    save,
    tall_masks,
    task_vectors,
)
from calmerge._merged import storage
from calmerge._random import uniform
from calmerge._weights import ALL, Memo, Spec, Weights, blocks
from calmerge.cli import app
from calmerge.pieces.mask import packed, unpacked
from calmerge.pieces.patch import MaskPatch
from calmerge.recipe import recipe_from_dict

SHAPES = {"w": (7, 3), "v": (13,), "number": (), "none": (0, 4), "deep": (5, 2, 3)}


def masks() -> StateDict:
    return StateDict({name: uniform(shape, name) < 0.5 for name, shape in SHAPES.items()})


@pytest.mark.parametrize("size", [1, 2, 3, 8, 1000])
def test_masks_are_packed_and_unpacked_the_same_in_any_block(size: int) -> None:
    whole = masks()
    bits = packed(whole)
    assert {n: bits.specs[n].shape for n in SHAPES} == {
        "w": (3,),
        "v": (2,),
        "number": (1,),
        "none": (0,),
        "deep": (4,),
    }
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    for name, rows in blocks(bits, size):
        parts[name].append(bits.read(name, rows))
    stored = StateDict({name: torch.cat(part) for name, part in parts.items()})
    assert all(torch.equal(stored[name], bits[name]) for name in SHAPES)
    again = unpacked(stored, whole.specs)
    for name, rows in blocks(again, size):
        assert torch.equal(again.read(name, rows), whole.read(name, rows)), (name, rows)


def test_an_unknown_task_is_named_with_the_known_ones(toy: Any) -> None:
    with pytest.raises(UsageError, match=r"no task 'z'\. Known: a, b, c, d\."):
        tall_masks(toy.tvs).for_task("z")


@pytest.mark.parametrize("method", [tall_masks, emr])
@pytest.mark.parametrize("shard", ["5GB", 100])
def test_a_saved_folder_restores_every_task_to_the_bit(
    method: Callable[..., Merged], shard: str | int, toy: Any, tmp_path: Path
) -> None:
    tvs = toy.tvs
    merged = method(tvs)
    manifest = save(tmp_path / "out", tvs, merged, shard=shard, chunk=8, threads=2)
    again = open_merged(tmp_path / "out")
    assert list(again.patches) == list(tvs.tasks)
    for task in tvs.tasks:
        expected, restored = add(tvs.base, merged.for_task(task)), add(tvs.base, again.for_task(task))
        export(tmp_path / "out", task, tmp_path / task)
        exported = open_checkpoint(tmp_path / task)
        for name, tensor in expected.items():
            assert torch.equal(restored[name], tensor)
            assert torch.equal(exported[name], tensor)
    stored = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tvs.base.items())
    written = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.safetensors")}
    assert written == {f for f in manifest["files"] if f.endswith(".safetensors")}


def test_masks_take_one_bit_an_entry_on_disk(toy: Any, tmp_path: Path) -> None:
    manifest = save(tmp_path / "out", toy.tvs, tall_masks(toy.tvs))
    cost = manifest["storage"]
    for task in toy.tvs.tasks:
        on_disk = sum(t.numel() for t in open_checkpoint(tmp_path / "out" / "patches" / task).values())
        assert on_disk == cost["patches"][task] == sum(-(-spec.numel // 8) for spec in toy.tvs.specs.values())
    assert cost["all"] == toy.tvs.base.nbytes + 4 * toy.tvs.numel + sum(cost["patches"].values())


@pytest.mark.parametrize(("n", "experts", "masks"), [(8, 23.31, 7.14), (14, 40.18, 7.67), (20, 57.04, 8.20)])
def test_the_storage_arithmetic_of_the_paper(n: int, experts: float, masks: float) -> None:
    """ViT-B/32: 87,849,216 trained numbers, 25,599,489 frozen ones. Experts take 32 (T N + F) bits, and masks
    32 (2 N + F) + T N; in gigabits. Nothing is read."""

    class Unread(Weights):
        def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
            self.specs = {name: Spec(shape, torch.float32) for name, shape in shapes.items()}

        def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> torch.Tensor:
            raise AssertionError(f"{name} was read")

    trained, frozen = {"visual": (87_849_216,)}, {"text": (25_599_489,)}
    opened = {f"t{i}": Unread(trained | frozen) for i in range(n)}
    tvs = task_vectors(Unread(trained | frozen), opened, exclude=["text"])
    found = storage(tall_masks(tvs), tvs.base, tvs.experts)
    assert round(found["experts"] * 8 / 1e9, 2) == experts
    assert round(found["all"] * 8 / 1e9, 2) == masks


def test_a_type_that_was_asked_for_is_the_exported_model_s(toy: Any, tmp_path: Path) -> None:
    merged = emr(toy.tvs)
    save(tmp_path / "out", toy.tvs, merged, dtype=torch.bfloat16)
    export(tmp_path / "out", "a", tmp_path / "a")
    expected = add(toy.tvs.base, merged.for_task("a"), dtype=torch.bfloat16)
    exported = open_checkpoint(tmp_path / "a")
    assert all(torch.equal(exported[n], t) and exported[n].dtype == t.dtype for n, t in expected.items())


def test_half_precision_models_are_restored_to_the_bit(toy: Any, tmp_path: Path) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in toy.base.items()}
    tvs = task_vectors(half, toy.experts)
    merged = emr(tvs)
    save(tmp_path / "out", tvs, merged)
    export(tmp_path / "out", "c", tmp_path / "c")
    expected, exported = add(tvs.base, merged.for_task("c")), open_checkpoint(tmp_path / "c")
    assert all(torch.equal(exported[n], t) for n, t in expected.items())


def test_patches_of_an_unknown_kind_are_refused(toy: Any, tmp_path: Path) -> None:
    save(tmp_path / "out", toy.tvs, tall_masks(toy.tvs))
    (tmp_path / "out" / "patches" / "b" / "patch.json").write_text('{"kind": "masq"}')
    with pytest.raises(CheckpointError, match=r"unknown kind of patch 'masq'\. Did you mean 'mask'\?"):
        open_merged(tmp_path / "out")


def test_a_folder_of_one_model_has_no_patches(toy: Any, tmp_path: Path) -> None:
    save(tmp_path / "out", toy.tvs, toy.tvs.of("a"))
    with pytest.raises(CheckpointError, match="one model for all tasks"):
        open_merged(tmp_path / "out")


def test_a_call_that_gives_one_model_refuses_a_model_per_task(toy: Any) -> None:
    with pytest.raises(UsageError, match=r"tall_masks gives a model for each task"):
        merge(toy.base, toy.experts, "tall_masks")


def test_a_mask_without_a_number_leaves_the_shared_vector_as_it_is() -> None:
    patch = MaskPatch(StateDict({"w": torch.tensor([True, False])}))
    assert list(patch.stored) == ["mask/w"]
    assert MaskPatch.restore(patch.stored, StateDict({"w": torch.zeros(2)})).scale is None


# In recipes and on the command line


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (["tall_masks", "lines"], "tall_masks before it gives a model for each task, and lines takes one merge"),
        (["emr", "average"], "emr before it gives a model for each task, and average takes one merge"),
        ([{"dare": {"inner": "emr"}}], "emr gives a model for each task; here one merge is needed"),
    ],
)
def test_a_model_per_task_ends_a_pipe(pipe: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_from_dict({"base": "./base", "experts": {"a": "./a"}, "merge": pipe})


def test_a_recipe_writes_it_and_export_takes_one_task_out(
    toy: Any, tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "base", toy.base)
    for task in ("a", "b"):
        write_folder(tmp_path / task, toy.experts[task])
    (tmp_path / "r.yaml").write_text(
        "base: ./base\nexperts: {a: ./a, b: ./b}\nout: merged\n"
        "merge: [{tall_masks: {threshold: {a: 0.2, b: 0.6}, inner: {ties: {combine: sum}}}}]\n"
    )
    run = CliRunner()
    done = run.invoke(app, ["merge", "r.yaml", "--quiet"])
    assert done.exit_code == 0, done.output
    assert "patch of a" in done.output
    assert "calmerge export" in done.output
    assert run.invoke(app, ["export", "merged", "--task", "b", "--quiet"]).exit_code == 0
    assert set(open_checkpoint(tmp_path / "merged-b")) == set(toy.base)
