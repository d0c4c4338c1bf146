"""The conformance table: what every method must pass, whatever it does."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from calmerge import (
    Adapter,
    CheckpointError,
    Merged,
    Run,
    TaskVectors,
    UsageError,
    Weights,
    _compiled,
    _reader,
    add,
    open_checkpoint,
    save,
    task_arithmetic,
    task_vectors,
)
from calmerge._hints import alternatives, intervals
from calmerge._measure import settle
from calmerge._pipe import takes_merged
from calmerge._random import uniform
from calmerge._signature import checked_call, options_of
from calmerge._weights import ALL, blocks
from calmerge.methods import METHODS
from calmerge.recipe import build, load_recipe, recipe_from_dict


@dataclass(frozen=True)
class Row:
    """What one method declares.

    Args:
        options: with which the properties are tried.
        permutes: whether the order of the experts is irrelevant.
        scales: whether c times the task vectors give c times the delta.
        single: by options, how much of a single expert's vector comes out; None where that is no fixed share.
        experts: how many the method takes, where it is a fixed number.
        learns: whether it needs data.
        random: whether another seed gives another result.
        beside: whether what it draws and learns lies beside the weights, in a router or before the heads.
        rounds: whether order and scale of the experts may change the last bits, as in a factorisation.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    permutes: bool = True
    scales: bool = True
    single: tuple[Mapping[str, Any], float] | None = field(default=({}, 1.0))
    experts: int = 4
    learns: bool = False
    random: bool = False
    rounds: bool = False
    beside: bool = False


ADAMERGING = {"steps": 2, "batch": 8, "lr": 0.05}

TABLE = {
    "adamerging": Row(ADAMERGING, scales=False, single=({"steps": 0}, 0.3), learns=True, random=True),
    "adamerging_pp": Row(
        ADAMERGING | {"keep": 0.5}, scales=False, single=({"steps": 0, "keep": 1.0}, 0.3), learns=True, random=True
    ),
    "adarank": Row(
        {"steps": 2, "batch": 8, "lr": 0.05}, scales=False,
        single=({"start": "base", "steps": 0, "coefficient": 1.0}, 1.0), learns=True, random=True, rounds=True,
    ),
    "arcee_fusion": Row(permutes=False, scales=False, single=None, experts=1),
    "average": Row(),
    "breadcrumbs": Row({"keep": 0.5, "outliers": 0.1}, single=({"keep": 1.0, "outliers": 0.0}, 0.2)),
    "calm": Row(
        {"steps": 3, "batch": 8, "sequential": 1}, permutes=False, scales=False, single=({"sequential": 0}, 1.0),
        learns=True, random=True,
    ),
    "calm_joint": Row(
        {"steps": 2, "batch": 8}, scales=False, single=({"steps": 0}, 1.0), learns=True, random=True, rounds=True
    ),
    "cart": Row({"keep": 0.5}, rounds=True),
    "concrete_adamerging": Row(
        {"mask_steps": 2, "steps": 2, "batch": 8, "lr": 0.05}, scales=False,
        single=({"mask_steps": 0, "steps": 0, "evaluation": "expected"}, 0.3), learns=True, random=True,
    ),
    "concrete_task_arithmetic": Row(
        {"steps": 2, "batch": 8, "lr": 0.05}, scales=False, single=({"steps": 0, "evaluation": "expected"}, 0.3),
        learns=True, random=True,
    ),
    "consensus": Row(single=({"k": 1}, 1.0)),
    "core_space": Row(rounds=True),
    "dam": Row(
        {"mask_steps": 2, "steps": 2, "batch": 8, "lr": 0.05}, scales=False,
        single=({"mask_steps": 0, "steps": 0, "evaluation": "expected"}, 0.3), learns=True, random=True,
    ),
    "dare": Row({"rate": 0.5}, single=({"rate": 0.0}, 0.3), random=True),
    "dare_ties": Row({"rate": 0.5, "keep": 0.4}, single=({"rate": 0.0, "keep": 1.0}, 1.0), random=True),
    "dc_merge": Row({"keep": 0.2}, single=({}, 1.0), rounds=True),
    "della": Row({"rate": 0.5}, single=({"rate": 0.0, "spread": 0.0}, 1.0), random=True, rounds=True),
    "della_linear": Row({"rate": 0.5}, single=({"rate": 0.0, "spread": 0.0}, 0.3), random=True, rounds=True),
    "distillation": Row(
        {"steps": 2, "batch": 8, "lr": 0.01}, scales=False, single=({"steps": 0}, 1.0), learns=True, random=True
    ),
    "doge": Row({"steps": 3, "lr": 0.01}, scales=False, single=None, rounds=True),
    "doge_vectors": Row(
        {"steps": 3, "lr": 0.01}, scales=False, single=({"steps": 0, "keep": 1.0}, 1.0), rounds=True
    ),
    "drop_and_rescale": Row({"rate": 0.5}, single=({"rate": 0.0}, 1.0), random=True),
    "emr": Row(),
    "equal_norms": Row(rounds=True),
    "fisher": Row({"examples": 4}, scales=False, learns=True, random=True, rounds=True),
    "frank_wolfe": Row(
        {"steps": 2, "samples": 4}, scales=False, single=({"steps": 0}, 0.3), learns=True, random=True
    ),
    "frank_wolfe_soft": Row(
        {"steps": 2, "samples": 8, "updates": 2, "batch": 4, "lr": 0.05}, permutes=False, scales=False,
        single=({"steps": 0}, 0.0), learns=True, random=True,
    ),
    "iso_c": Row(single=None, rounds=True),
    "iso_cts": Row(single=None, rounds=True),
    "karcher": Row(scales=False, rounds=True),
    "knots": Row(single=None, rounds=True),
    "lines": Row({"beta": 0.5}, single=({"beta": 0.0}, 1.0)),
    "localize_and_stitch": Row(
        {"steps": 20, "batch": 8, "share": 0.3}, scales=False, single=None, learns=True, random=True
    ),
    "localize_and_stitch_dataless": Row({"keep": 0.5}, single=({"keep": 1.0}, 1.0)),
    "magmax": Row(single=({}, 0.5)),
    "magprune": Row({"rate": 0.5}, single=({"rate": 0.0, "spread": 0.0}, 1.0), random=True, rounds=True),
    "map_front": Row(
        {"score": "expert_kl", "budget": 20}, permutes=False, scales=False, single=None, learns=True, random=True
    ),
    "map_nested": Row(
        {"score": "expert_kl", "budget": 20, "samples": 6}, permutes=False, scales=False, single=None, learns=True,
        random=True,
    ),
    "medsamix": Row(
        {"score": "expert_kl", "budget": 40}, permutes=False, scales=False, single=None, learns=True, random=True
    ),
    "mergekit_breadcrumbs": Row(
        {"weight": [0.5], "density": [0.5], "gamma": [0.1]}, single=({"weight": [0.5], "gamma": [0.0]}, 0.5)
    ),
    "mergekit_breadcrumbs_ties": Row(
        {"weight": [0.5], "density": [0.5], "gamma": [0.1]}, single=({"weight": [0.5], "gamma": [0.0]}, 0.5)
    ),
    "mergekit_dare_linear": Row(
        {"weight": [0.5], "density": [0.5]}, single=({"weight": [0.5]}, 0.5), random=True, rounds=True
    ),
    "mergekit_dare_ties": Row(
        {"weight": [0.5], "density": [0.5]}, single=({"weight": [0.5]}, 0.5), random=True, rounds=True
    ),
    "mergekit_della": Row(
        {"weight": [0.5], "density": [0.5]}, single=({"weight": [0.5]}, 1.0), random=True, rounds=True
    ),
    "mergekit_della_linear": Row(
        {"weight": [0.5], "density": [0.5]}, single=({"weight": [0.5]}, 0.5), random=True, rounds=True
    ),
    "mergekit_linear": Row({"weight": [0.5]}, single=({"weight": [2.0]}, 1.0)),
    "mergekit_model_stock": Row(single=None, rounds=True),
    "mergekit_ram": Row(),
    "mergekit_ramplus_tl": Row(rounds=True, single=None),
    "mergekit_sce": Row({"select_topk": 0.5}, single=({}, 1.0), rounds=True),
    "mergekit_task_arithmetic": Row({"weight": [0.5]}, single=({"weight": [0.5]}, 0.5)),
    "mergekit_ties": Row({"weight": [0.5], "density": [0.5]}, single=({"weight": [0.5]}, 1.0)),
    "middle": Row({"keep": 0.5, "outliers": 0.1}, single=({"keep": 1.0, "outliers": 0.0}, 1.0)),
    "model_stock": Row(rounds=True),
    "multislerp": Row({"weight": [0.5]}, single=({"weight": [2.0]}, 1.0), rounds=True),
    "nearswap": Row({"t": 0.1}, permutes=False, scales=False, single=({"t": 10.0}, 1.0), experts=1),
    "negate": Row(single=({}, -1.0)),
    "nuslerp": Row({"weight": [0.3, 0.7]}, permutes=False, single=None, experts=2, rounds=True),
    "only": Row({"experts": ["b"]}, single=None),
    "passthrough": Row(permutes=False, experts=1),
    "pcb": Row({"keep": 0.5}, single=({"keep": 1.0, "clip": 0.0, "scale": 1.0}, 1.0)),
    "peft": Row(
        {"combination": "dare_linear", "density": 0.5}, single=({"combination": "svd"}, 1.0), random=True
    ),
    "prodistill": Row(
        {"epochs": 1, "examples": 8}, permutes=False, scales=False, single=({"epochs": 0}, 0.3), learns=True,
        random=True,
    ),
    "ram": Row(scales=False),
    "ram_plus": Row(scales=False),
    "realign_heads": Row(scales=False, single=({}, 0.3), learns=True),
    "regmean": Row({"examples": 12}, scales=False, learns=True, random=True, rounds=True),
    "regmean_pp": Row({"examples": 12}, scales=False, learns=True, random=True, rounds=True),
    "sce": Row({"select_topk": 0.5}, single=({}, 1.0), rounds=True),
    "searched": Row(
        {"space": {"task_arithmetic.scale": [0.1, 1.0]}, "budget": 3}, scales=False,
        single=None, learns=True, random=True,
    ),
    "self_positioning": Row(
        {"steps": 2, "batch": 2}, scales=False, single=({"batch": 2}, 1.0), learns=True, random=True
    ),
    "slerp": Row({"t": 0.3}, permutes=False, scales=False, single=None, experts=2),
    "smile": Row({"rank": 2, "rest": "mean"}, single=({"rank": None, "rest": "mean"}, 1.0), rounds=True),
    "surgery": Row(
        {"steps": 2, "batch": 8}, scales=False, single=({}, 0.3), learns=True, random=True, beside=True
    ),
    "svc": Row(rounds=True),
    "tall_masks": Row(),
    "task_arithmetic": Row(single=({}, 0.3)),
    "ties": Row({"keep": 0.5}, single=({"keep": 1.0}, 1.0)),
    "ties_split": Row({"keep": 0.5}, single=({"keep": 1.0}, 1.0)),
    "trim": Row({"keep": 0.5}, single=({"keep": 1.0}, 1.0)),
    "truncate": Row({"keep": 0.5}, single=({"keep": 1.0}, 1.0), rounds=True),
    "tsv_c": Row({"keep": 0.2}, single=({"keep": 1.0}, 1.0), rounds=True),
    "tsv_m": Row(rounds=True),
    "twin_merging": Row({"keep": 0.2}, single=({"keep": 1.0}, 1.0), rounds=True),
    "twin_merging_routed": Row(
        {"steps": 2, "batch": 8}, scales=False, single=({"keep": 1.0}, 1.0), learns=True, random=True, rounds=True,
        beside=True,
    ),
    "weigh": Row({"weights": {"b": 0.5}}, single=({"weights": {"b": 0.5}}, 0.5)),
    "weighted_average": Row({"weights": {"b": 0.5}}, single=({"weights": {"b": 0.5}}, 1.0)),
    "wudi": Row({"steps": 3}, scales=False, rounds=True),
}  # fmt: skip

methods = pytest.mark.parametrize("name", sorted(TABLE))


@pytest.fixture
def toy(toy: Any, request: pytest.FixtureRequest) -> Any:
    """As many experts as the method takes, 'b' among them."""
    kept = sorted(toy.experts, key="badc".index)[: TABLE[request.node.callspec.params["name"]].experts]
    toy.experts = {task: expert for task, expert in toy.experts.items() if task in kept}
    return toy


def where(declared: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [n for n, row in sorted(TABLE.items()) if getattr(row, declared)])


def result(name: str, tvs: TaskVectors, toy: Any, **options: Any) -> Weights:
    """The delta: of pieces that give task vectors their sum, of what works on a merge that of the sum, of b's model."""
    if TABLE[name].learns:
        options = {"tasks": toy.tasks} | options
    return one_delta(checked_call(METHODS[name], *arguments(name, tvs), **options))


def arguments(name: str, tvs: TaskVectors) -> tuple[Any, ...]:
    return (task_arithmetic(tvs, scale=1.0), tvs) if takes_merged(METHODS[name]) else (tvs,)


def one_delta(given: TaskVectors | Merged | Weights) -> Weights:
    if isinstance(given, TaskVectors):
        return given.reduce(lambda tau, site: tau.sum(0))
    return given.for_task("b") if isinstance(given, Merged) else given


def merged(name: str, toy: Any, **options: Any) -> dict[str, Tensor]:
    return dict(add(toy.tvs.base, result(name, toy.tvs, toy, **(dict(TABLE[name].options) | options))))


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same_bytes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and bits(a[n]) == bits(b[n]) for n in a)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def test_every_method_stands_in_the_table() -> None:
    assert sorted(METHODS) == sorted(TABLE)


@methods
def test_declares_its_data_and_its_seed(name: str) -> None:
    options = options_of(METHODS[name])
    assert ("tasks" in options) == TABLE[name].learns
    assert ("seed" in options) == TABLE[name].random
    assert ("run" in options) == TABLE[name].learns


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_deltas_give_the_base_bit_for_bit(name: str, dtype: torch.dtype, toy: Any) -> None:
    toy.base["fc1.bias"][:2] = torch.tensor([-0.0, 0.0])
    toy.base["norm.weight"][0] = 1e-8
    toy.base = cast(toy.base, dtype)
    toy.experts = {task: {n: t.clone() for n, t in toy.base.items()} for task in toy.experts}
    assert same_bytes(merged(name, toy), toy.base)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_names_shapes_and_dtypes_are_the_base_s(name: str, dtype: torch.dtype, toy: Any) -> None:
    toy.base = cast(toy.base, dtype)
    toy.experts = {task: cast(expert, torch.float32) for task, expert in toy.experts.items()}
    out = merged(name, toy)
    assert [(n, t.shape, t.dtype) for n, t in out.items()] == [(n, t.shape, t.dtype) for n, t in toy.base.items()]
    assert any(bits(out[n]) != bits(t) for n, t in toy.base.items())


@methods
def test_integer_tensors_are_the_base_s(name: str, toy: Any) -> None:
    for expert in toy.experts.values():
        expert["order"] = torch.tensor([0, 1, 2, 3, 4])
    assert merged(name, toy)["order"].tolist() == [4, 3, 2, 1, 0]


@where("permutes")
def test_the_order_of_experts_is_irrelevant_where_declared(name: str, toy: Any) -> None:
    first = merged(name, toy)
    toy.experts = {task: toy.experts[task] for task in ("c", "a", "d", "b")}
    again = merged(name, toy)
    if not (TABLE[name].learns or TABLE[name].rounds):
        assert same_bytes(first, again)
    for n in first:
        torch.testing.assert_close(first[n], again[n], rtol=0, atol=1e-6)


@where("scales")
def test_the_delta_scales_with_the_task_vectors_where_declared(name: str, toy: Any) -> None:
    delta = result(name, toy.tvs, toy, **TABLE[name].options)
    double = result(name, toy.tvs.transform(lambda tau, site: 2 * tau), toy, **TABLE[name].options)
    for n in delta:
        if TABLE[name].rounds:
            torch.testing.assert_close(double[n], 2 * delta[n], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(double[n], 2 * delta[n])


@where("single")
def test_a_single_expert_gives_what_is_declared(name: str, toy: Any) -> None:
    options, share = TABLE[name].single or ({}, 0.0)
    toy.experts = {"b": toy.experts["b"]}
    tvs = toy.tvs
    delta = result(name, tvs, toy, **options)
    for n in tvs:
        exact = {"rtol": 1e-6, "atol": 0.0}
        torch.testing.assert_close(
            delta[n], share * tvs[n][0], **({"rtol": 1e-5, "atol": 1e-6} if TABLE[name].rounds else exact)
        )


@pytest.mark.parametrize("name", [n for n, row in sorted(TABLE.items()) if 1 < row.experts < Row.experts])
def test_another_number_of_experts_is_refused_where_it_is_fixed(name: str, toy: Any) -> None:
    toy.experts = dict.fromkeys("bcd", toy.experts["b"])
    with pytest.raises(UsageError, match=rf"{name} .*, got 3 .*\(b, c, d\)"):
        result(name, toy.tvs, toy, **TABLE[name].options)


@methods
def test_inputs_are_not_changed(name: str, toy: Any) -> None:
    before = {task: {n: t.clone() for n, t in e.items()} for task, e in {**toy.experts, "base": toy.base}.items()}
    merged(name, toy)
    assert all(same_bytes(before[task], e) for task, e in {**toy.experts, "base": toy.base}.items())
    assert all(not t.requires_grad and t.grad is None for t in toy.base.values())


@methods
@pytest.mark.parametrize("shards", [1, 3])
def test_streaming_from_files_gives_the_bytes_of_memory(
    name: str, shards: int, toy: Any, tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    expected = dict(result(name, toy.tvs, toy, **TABLE[name].options))
    files = {task: write_folder(tmp_path / task, expert, shards) for task, expert in toy.experts.items()}
    tvs = task_vectors(write_folder(tmp_path / "base", toy.base, shards), files)
    delta = result(name, tvs, toy, **TABLE[name].options)
    assert {n: bits(delta[n]) for n in delta} == {n: bits(t) for n, t in expected.items()}


@methods
def test_any_chunk_gives_the_bytes_of_the_whole(name: str, toy: Any) -> None:
    delta = result(name, toy.tvs, toy, **TABLE[name].options)
    whole = dict(delta)
    for rows in (1, 2, 4, 8):
        for n, tensor in whole.items():
            if tensor.dim():
                parts = [delta.read(n, slice(i, min(i + rows, len(tensor)))) for i in range(0, len(tensor), rows)]
                assert bits(torch.cat(parts)) == bits(tensor)
    for size in (1, 7, 16):
        parts_of: dict[str, list[Tensor]] = {}
        for n, chosen in blocks(delta, size=size):
            part = delta.read(n, chosen)
            parts_of.setdefault(n, []).append(part if chosen != ALL else part.reshape(whole[n].shape))
        for n, parts in parts_of.items():
            assert bits(torch.cat(parts) if len(parts) > 1 else parts[0]) == bits(whole[n])


@methods
def test_any_shard_chunk_and_number_of_threads_writes_the_same_bytes(name: str, toy: Any, tmp_path: Path) -> None:
    tvs = toy.tvs
    delta = result(name, tvs, toy, **TABLE[name].options)
    expected = dict(add(tvs.base, delta))
    settings = [("5GB", 2**18, 1), ("5GB", 8, 3), (200, 2**18, 1), (200, 8, 3)]
    for i, (shard, chunk, threads) in enumerate(settings):
        save(tmp_path / str(i), tvs, delta, shard=shard, chunk=chunk, threads=threads)
        written = open_checkpoint(tmp_path / str(i))
        assert {n: bits(written[n]) for n in written} == {n: bits(t) for n, t in expected.items()}
    for one, two in ((0, 1), (2, 3)):
        files = sorted(f.name for f in (tmp_path / str(one)).glob("*.safetensors"))
        assert len(files) == (1 if one == 0 else len(files)) > 0
        assert all((tmp_path / str(one) / f).read_bytes() == (tmp_path / str(two) / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", [n for n, row in sorted(TABLE.items()) if not row.learns])
def test_tapes_give_the_bytes_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    draw = torch.Generator().manual_seed(0)
    # tensors of one shape, which may share a tape, and one of another
    shapes = {"layers.0.w": (40, 32), "layers.1.w": (40, 32), "layers.1.b": (1600,), "layers.2.w": (40, 32)}
    base = {n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}
    experts = {
        task: {n: (w.float() + 0.05 * torch.randn(w.shape, generator=draw)).bfloat16() for n, w in base.items()}
        for task in list("abcd")[: TABLE[name].experts]
    }
    outputs = []
    for large in (10**9, 0):
        monkeypatch.setattr(_compiled, "LARGE", large)
        monkeypatch.setattr(_reader, "_LONG", 0)
        tvs = task_vectors(base, experts)
        whole = add(tvs.base, result(name, tvs, None, **TABLE[name].options))
        settle([whole], threads=1)
        reader = _reader.Reader([whole])
        outputs.append({(n, rows.start): bits(reader.read(n, rows)[0]) for n, rows in blocks(whole, size=640)})
    assert outputs[0] == outputs[1]


@methods
def test_the_same_call_gives_the_same_bytes_whatever_was_drawn_before(name: str, toy: Any) -> None:
    torch.manual_seed(1)
    first = merged(name, toy)
    torch.manual_seed(2)
    assert same_bytes(first, merged(name, toy))


@pytest.mark.parametrize("name", [n for n, row in sorted(TABLE.items()) if row.random and not row.beside])
def test_a_seed_decides_where_there_is_one(name: str, toy: Any) -> None:
    """Of what a method trains beside the weights (a router), its own tests ask the same."""
    first = merged(name, toy, seed=0)
    assert same_bytes(first, merged(name, toy, seed=0))
    more = {"steps": 20, "share": 0.3} if name == "calm" else {}
    assert not same_bytes(merged(name, toy, seed=0, **more), merged(name, toy, seed=12345, **more))


def mistakes(hint: Any) -> list[Any]:
    """Values that an option must not take: beyond its range, or not among its choices."""
    ranges = [v for i in intervals(hint) for v in (i.low - 1, i.high + 1, float("nan")) if v not in i]
    whole = [v for v in ranges if int not in plain_types(hint) or float(v).is_integer()]
    choices = ["nonsense"] if any(get_origin(h) is Literal for h in alternatives(hint)) else []
    return [int(v) if int in plain_types(hint) else v for v in whole if v not in (-inf, inf)] + choices


def plain_types(hint: Any) -> set[Any]:
    return {get_args(h)[0] if get_origin(h) is Annotated else h for h in alternatives(hint)}


@methods
def test_values_out_of_range_are_refused_in_a_plain_call(name: str, toy: Any) -> None:
    """A percentage given for a fraction must not turn into "keep all"."""
    given = {"tasks": toy.tasks} if TABLE[name].learns else {}
    for option in options_of(METHODS[name]).values():
        for bad in mistakes(option.hint):
            with pytest.raises(UsageError, match=rf"\.{option.name} must "):
                METHODS[name](*arguments(name, toy.tvs), **given, **(dict(TABLE[name].options) | {option.name: bad}))


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_tensor_and_task(name: str, bad: float, toy: Any) -> None:
    toy.experts["b"]["fc1.weight"][1, 2] = bad
    with pytest.raises(CheckpointError, match=r"expert 'b': tensor 'fc1.weight' has 1 entries that are NaN or inf"):
        merged(name, toy)
    toy.experts["b"]["fc1.weight"][1, 2] = 0.0
    toy.base["norm.bias"][0] = bad
    with pytest.raises(CheckpointError, match=r"the base: tensor 'norm.bias' has 1 entries that are NaN or inf"):
        merged(name, toy)


@methods
def test_a_recipe_is_the_same_call(name: str, toy: Any, tmp_path: Path) -> None:
    """Written as YAML and read again it gives the bytes of the function call."""
    steps: list[Any] = [{name: dict(TABLE[name].options)}]
    if takes_merged(METHODS[name]):
        steps.insert(0, {"task_arithmetic": {"scale": 1.0}})
    if METHODS[name].__annotations__["return"] is TaskVectors:
        steps.append({"task_arithmetic": {"scale": 1.0}})
    written: dict[str, Any] = {"base": "./base", "experts": {t: f"./{t}" for t in toy.experts}, "merge": steps}
    if TABLE[name].learns:
        written["model"] = {"kind": "sequence-classifier"}
        written["tasks"] = {t: {"classes": ["yes", "no"], "pool": "pool.csv"} for t in toy.experts}
    recipe = recipe_from_dict(written, folder=tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.to_dict() == recipe.to_dict() == written
    expected = {n: t for n, t in merged(name, toy).items() if n in toy.tvs}
    for read in (recipe, again):
        assert read.needs_tasks() == TABLE[name].learns
        tvs = toy.tvs
        delta = one_delta(build(read)(tvs, toy.tasks if TABLE[name].learns else None, None))
        found = {n: bits(t) for n, t in add(tvs.base, delta).items() if n in tvs}
        assert found == {n: bits(t) for n, t in expected.items()}


@where("learns")
def test_progress_and_trace_are_left_where_something_is_learned(name: str, toy: Any) -> None:
    run = Run()
    merged(name, toy, run=run)
    (trace,) = run.trace.values()
    assert type(trace).model_validate_json(trace.model_dump_json()) == trace


@methods
def test_the_card_is_complete(name: str) -> None:
    """One line, every argument, an example, and where it was published."""
    fn = METHODS[name]
    card = inspect.getdoc(fn)
    assert card
    summary, _, rest = card.partition("\n\n")
    assert "\n" not in summary
    assert summary.endswith(".")
    assert ">>>" in rest
    source = re.search(r"^Source: (.+?)(?=\n\n|\nDifferences:|\Z)", rest, re.MULTILINE | re.DOTALL)
    assert source, "no 'Source:'"
    assert re.search(r"(ICLR|ICML|NeurIPS|TMLR|PMLR|CVPR|ICCV|ECCV|ACL|EMNLP|arXiv)\s+(19|20)\d\d", source[1])
    arguments = re.search(r"^Args:\n((?:    .*\n|\n)+)", rest, re.MULTILINE)
    assert arguments, "no 'Args:'"
    described = re.findall(r"^    (\w+): ", arguments[1], re.MULTILINE)
    assert described == list(inspect.signature(fn).parameters)


OUTSIDE_DELTA_SPACE = {"core_space", "knots", "peft"}  # made for factors: their adapters are not merged as full models


def low_rank(toy: Any, gauge: Tensor) -> tuple[TaskVectors, TaskVectors]:
    """Experts that differ from the toy's base by B A in two matrices, as adapters (B G, G^-1 A) and as full models."""
    adapters, full = {}, {}
    for task in toy.experts:
        factors, tensors = {}, {}
        for module in ("fc1", "fc2"):
            m, n = toy.base[f"{module}.weight"].shape
            a, b = ((8 * uniform(shape, task, module, shape) - 4).round() / 8 for shape in ((2, n), (m, 2)))
            factors |= {f"{module}.lora_A.weight": gauge.inverse() @ a, f"{module}.lora_B.weight": b @ gauge}
            tensors[f"{module}.weight"] = toy.base[f"{module}.weight"] + b @ a
        adapters[task] = Adapter(factors, {"r": 2, "lora_alpha": 2})
        full[task] = toy.base | tensors
    others = [n for n in toy.base if n not in ("fc1.weight", "fc2.weight")]
    return task_vectors(toy.base, adapters), task_vectors(toy.base, full, exclude=others)


@methods
def test_adapters_merge_as_the_full_models_they_make_however_they_are_stored(name: str, toy: Any) -> None:
    """(B G)(G^-1 A) is the adapter (B, A): whatever merges updates cannot tell one from the other."""
    if TABLE[name].learns:
        return
    stored = [low_rank(toy, torch.tensor(g)) for g in ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]])]
    one, two = (dict(result(name, adapters, toy, **TABLE[name].options)) for adapters, _ in stored)
    full = dict(result(name, stored[0][1], toy, **TABLE[name].options))
    for n in ("fc1.weight", "fc2.weight"):
        if name == "peft":
            assert one[n].shape == full[n].shape  # draws on factors, as PEFT does
        elif name in OUTSIDE_DELTA_SPACE:
            torch.testing.assert_close(one[n], two[n], rtol=0, atol=1e-4)
        else:
            assert bits(one[n]) == bits(two[n]) == bits(full[n])
