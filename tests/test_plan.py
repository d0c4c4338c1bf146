"""Plans: what headers tell about passes, bytes and memory, and whether it is true."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmerge as cm
from calmerge import TaskVectors, UsageError, Weights
from calmerge._measure import per_tensor, total
from calmerge._memory import peak_memory, private_memory
from calmerge._plan import _common, plan
from calmerge._random import uniform
from calmerge._save import to_write
from calmerge._weights import Spec
from calmerge._writer import write_weights

TASKS = 3


@pytest.fixture
def small() -> TaskVectors:
    base = {"a": torch.zeros(6, 5), "b": torch.zeros(10), "n": torch.tensor(1)}  # 168 bytes, 160 of them merged
    return cm.task_vectors(base, {str(t): base for t in range(TASKS)})


def squares(tvs: TaskVectors) -> Weights:
    """A number for every tensor, and then one over the model that depends on them."""
    norms = per_tensor(tvs, lambda w: total(w, lambda tau: tau.square().sum()))
    scaled = tvs.transform(lambda tau, norm, site: tau / norm, norms)
    return scaled.reduce(lambda tau, most, site: tau.sum(0) / most, total(scaled, lambda tau: tau.sum()))


@pytest.mark.parametrize(
    ("method", "kind", "passes"),
    [
        (cm.average, "A", 1),
        (cm.dare, "A", 1),
        (cm.ties, "C", 3),  # one for the threshold, one for the majority sign, one to write
        (lambda tvs: cm.dare(tvs, inner=cm.ties), "C", 3),
        (cm.tsv_m, "B", 1),
        (lambda tvs: cm.tsv_m(tvs).map(lambda w, n, site: w / n, total(tvs, torch.sum)), "B+C", 2),
        (squares, "C", 3),
    ],
)
def test_kind_and_passes_are_those_of_the_graph(
    method: Callable[[TaskVectors], Weights], kind: str, passes: int, small: TaskVectors
) -> None:
    found = plan(*to_write(small, method(small)))
    assert (found.kind, found.passes) == (kind, passes)
    assert found.reads == passes * (1 + TASKS) * 160 + 8
    assert found.writes == 168


def test_numbers_that_are_known_need_no_pass(small: TaskVectors) -> None:
    delta = cm.ties(small)
    cm._measure.settle([delta])
    assert plan(delta).passes == 1


def test_planning_reads_no_tensor(small: TaskVectors) -> None:
    class Headers(Weights):
        def __init__(self) -> None:
            self.specs = {"a": Spec((30,), torch.float32)}

    tvs = cm.task_vectors(Headers(), {"x": Headers(), "y": Headers()})
    for method in (cm.average, cm.ties, cm.tsv_m, cm.tall_masks):
        assert plan(*to_write(tvs, method(tvs))).memory > 0


def test_a_model_per_task_counts_all_that_is_written(small: TaskVectors) -> None:
    merged = cm.tall_masks(small)
    found = plan(*to_write(small, merged))
    assert found.writes == small.base.nbytes + merged.nbytes
    assert [list(files) for files in found.files] == [["model.safetensors"]] * (2 + TASKS)


def test_shards_are_those_that_are_written(small: TaskVectors, tmp_path: Path) -> None:
    weights = cm.add(small.base, cm.average(small))
    written = write_weights(tmp_path, weights, shard=100)
    assert {*plan(weights, shard=100).files[0], "model.safetensors.index.json"} == set(written)


def test_memory_grows_with_threads_and_experts() -> None:
    base = {"a": torch.zeros(1000, 1000)}

    def memory(experts: int, threads: int) -> int:
        tvs = cm.task_vectors(base, {str(t): base for t in range(experts)})
        return plan(*to_write(tvs, cm.average(tvs)), threads=threads).memory

    assert memory(2, 2) == 2 * memory(2, 1)
    assert memory(8, 1) > memory(2, 1)


def test_a_limit_is_kept_by_smaller_chunks_and_then_by_fewer_threads() -> None:
    base = {"a": torch.zeros(1000, 1000)}
    tvs = cm.task_vectors(base, {str(t): base for t in range(4)})
    weights = to_write(tvs, cm.average(tvs))
    free = plan(*weights, threads=4)
    present = private_memory() or 0
    less = plan(*weights, threads=4, max_memory=present + free.memory // 2)
    assert (less.threads, less.chunk) == (4, free.chunk // 4)
    least = plan(*weights, threads=4, max_memory=present + free.memory // 24)
    assert least.threads < 4
    assert least.memory < free.memory // 24


def test_a_limit_on_whole_tensors_is_kept_by_fewer_threads() -> None:
    base = {name: torch.zeros(400, 400) for name in "abcd"}
    tvs = cm.task_vectors(base, {str(t): base for t in range(4)})
    weights = to_write(tvs, cm.tsv_m(tvs))
    free = plan(*weights, threads=4)
    less = plan(*weights, threads=4, max_memory=(private_memory() or 0) + free.memory * 5 // 8)
    assert (less.threads, less.chunk) == (2, free.chunk)


def test_a_limit_that_cannot_be_kept_is_refused_with_the_figure() -> None:
    base = {"small": torch.zeros(2, 2), "big": torch.zeros(1000, 1000)}
    tvs = cm.task_vectors(base, {str(t): base for t in range(4)})
    with pytest.raises(UsageError, match=r"this merge needs (.*), got 1MB.*float32 copies of the largest, 'big'") as e:
        plan(*to_write(tvs, cm.tsv_m(tvs)), max_memory="1MB")
    needed = re.search(r"needs ([\d.]+) (MB|GB)", str(e.value))  # GB in a process that has grown large
    assert needed is not None
    megabytes = float(needed[1]) * (1000 if needed[2] == "GB" else 1)
    plan(*to_write(tvs, cm.tsv_m(tvs)), max_memory=f"{int(megabytes) + 60}MB")  # enough, if it grew a little more


def test_a_method_may_say_that_it_holds_more(small: TaskVectors) -> None:
    def memory(copies: int | None) -> int:
        return plan(small.reduce(lambda tau, site: tau.sum(0), elementwise=False, copies=copies), threads=1).memory

    assert memory(TASKS + 2) == memory(None)
    assert memory(50) - memory(40) == 10 * 30 * 4 * 2  # ten copies of the largest, doubled for what is freed and kept


def roots(tvs: TaskVectors) -> Weights:
    """A whole-tensor method whose working set is known: the Gram matrix of each tensor, T times."""
    return tvs.reduce(lambda tau, site: (tau @ tau.mT).sum(0), elementwise=False)


@pytest.mark.skipif(private_memory() is None, reason="the system does not tell private memory")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("method", "kind"), [(cm.average, "A"), (cm.dare, "A"), (cm.ties, "C"), (roots, "B")])
def test_memory_is_at_most_what_was_said(
    method: Callable[[TaskVectors], Weights], kind: str, threads: int, tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    def tensors(key: str) -> Mapping[str, Tensor]:
        return {f"{i}.w": uniform((700, 700), key, i).bfloat16() for i in range(6)}  # 5.9 MB as stored, 11.8 in float32

    base = write_folder(tmp_path / "base", tensors("base"))
    tvs = cm.task_vectors(base, {t: write_folder(tmp_path / t, tensors(t)) for t in "abcd"})
    weights = cm.add(tvs.base, method(tvs))
    found = plan(weights, threads=threads)
    assert found.kind == kind
    before = private_memory() or 0
    with peak_memory() as peak:
        write_weights(tmp_path, weights, threads=threads)
    assert peak.bytes is not None
    taken = peak.bytes - before
    assert taken <= found.memory + 16e6  # what libraries take for themselves when they are first called
    assert found.memory <= 200e6


def test_common_names_are_looked_for_among_the_fewer_alone() -> None:
    class Many(dict[str, object]):
        def __iter__(self) -> Any:
            raise AssertionError("gone through")

    many = Many({"a": 1, "b": 2, "c": 3})
    assert list(_common({"b": 0, "x": 0}, many)) == list(_common(many, {"b": 0, "x": 0})) == ["b"]
