"""Task vectors: which tensors are merged, which are kept per task, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calmerge import CheckpointError, TaskVectors, UsageError, task_vectors
from calmerge._task_vectors import materialise, own_names
from calmerge.pieces import trim

BASE = {"enc.w": torch.zeros(2, 3), "enc.b": torch.zeros(3), "steps": torch.tensor(7)}


def expert(x: float, **more: Tensor) -> dict[str, Tensor]:
    return {"enc.w": torch.full((2, 3), x), "enc.b": torch.full((3,), x), "steps": torch.tensor(9), **more}


def refusal(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], **options: object) -> str:
    with pytest.raises(CheckpointError) as e:
        task_vectors(base, experts, **options)  # type: ignore[arg-type]
    return str(e.value)


def test_a_stack_has_one_row_per_task_in_the_order_given() -> None:
    tvs = task_vectors(BASE, {"b": expert(2.0), "a": expert(1.0)})
    assert tvs.tasks == ("b", "a")
    assert tvs["enc.b"].tolist() == [[2, 2, 2], [1, 1, 1]]
    assert tvs.read("enc.w", slice(1, 2)).shape == (2, 1, 3)
    assert tvs.specs["enc.w"].shape == (2, 3)


def test_differences_are_taken_in_float32() -> None:
    base = {"w": torch.tensor([1.0], dtype=torch.float16)}
    tvs = task_vectors(base, {"a": {"w": torch.tensor([1.0 + 2**-10], dtype=torch.float16)}})
    assert tvs["w"].dtype == torch.float32
    assert tvs["w"].item() == 2**-10
    eight_bit = {"w": torch.tensor([1.0]).to(torch.float8_e4m3fn)}
    tvs = task_vectors(eight_bit, {"a": {"w": torch.tensor([1.125]).to(torch.float8_e4m3fn)}})
    assert tvs["w"].item() == 0.125


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_every_dtype_that_is_not_floating_is_skipped(dtype: torch.dtype) -> None:
    tvs = task_vectors(BASE | {"mask": torch.ones(2).to(dtype)}, {"a": expert(1.0, mask=torch.zeros(2).to(dtype))})
    assert tvs.skipped == {"steps": "integer tensor", "mask": "integer tensor"}
    assert list(tvs) == ["enc.w", "enc.b"]


def test_reasons_are_given_for_all_that_is_not_merged() -> None:
    base = BASE | {"emb.w": torch.zeros(4), "extra": torch.zeros(1), "cls.w": torch.zeros(2, 3)}
    own = {"emb.w": torch.zeros(4), "cls.w": torch.zeros(5, 3)}
    tvs = task_vectors(base, {"a": expert(1.0, **own)}, exclude=["emb.*"])
    assert tvs.skipped == {
        "steps": "integer tensor", "emb.w": "excluded by 'emb.*'", "extra": "in no expert",
        "cls.w": "head, kept per task",
    }  # fmt: skip
    assert list(tvs) == ["enc.w", "enc.b"]


def test_tensors_that_only_experts_have_are_heads() -> None:
    experts = {"a": expert(1.0, **{"cls.w": torch.ones(2, 3)}), "b": expert(1.0, **{"cls.w": torch.ones(5, 3)})}
    tvs = task_vectors(BASE, experts)
    assert {task: list(head) for task, head in tvs.heads.items()} == {"a": ["cls.w"], "b": ["cls.w"]}
    assert tvs.heads["b"]["cls.w"].shape == (5, 3)
    assert "cls.w" not in tvs


def test_a_head_differs_in_the_number_of_classes_alone() -> None:
    base = BASE | {"cls.w": torch.zeros(10, 3), "cls.b": torch.zeros(10)}
    tvs = task_vectors(base, {"a": expert(1.0, **{"cls.w": torch.ones(2, 3), "cls.b": torch.ones(2)})})
    assert list(tvs.heads["a"]) == ["cls.w", "cls.b"]
    wrong = {"cls.w": torch.ones(2, 4), "cls.b": torch.ones(2)}
    assert "tensor 'cls.w' has shape (2, 4), base has (10, 3)" in refusal(base, {"a": expert(1.0, **wrong)})


def test_a_head_of_one_task_is_one_of_all() -> None:
    base = BASE | {"cls.w": torch.zeros(2, 3)}
    experts = {"same": expert(1.0, **{"cls.w": torch.ones(2, 3)}), "other": expert(1.0, **{"cls.w": torch.ones(4, 3)})}
    tvs = task_vectors(base, experts)
    assert "cls.w" not in tvs
    assert {t: h["cls.w"].shape for t, h in tvs.heads.items()} == {"same": (2, 3), "other": (4, 3)}


def test_heads_of_the_base_s_shape_are_kept_where_they_are_named() -> None:
    base = BASE | {"cls.w": torch.zeros(2, 3)}
    experts = {"a": expert(1.0, **{"cls.w": torch.ones(2, 3)})}
    assert "cls.w" in task_vectors(base, experts)
    named = task_vectors(base, experts, heads=["cls*"])
    assert "cls.w" not in named
    assert list(named.heads["a"]) == ["cls.w"]


def test_longer_embeddings_are_never_cut_or_taken_for_heads() -> None:
    base = BASE | {"embed.weight": torch.zeros(10, 3)}
    message = refusal(base, {"a": expert(1.0, **{"embed.weight": torch.zeros(12, 3)})})
    assert "tensor 'embed.weight' has shape (12, 3), base has (10, 3). Exclude it" in message


def test_a_shape_that_differs_names_expert_tensor_and_both_shapes() -> None:
    wrong = {"cars": expert(1.0) | {"enc.w": torch.zeros(3, 2)}}
    assert refusal(BASE, wrong) == (
        "expert 'cars': tensor 'enc.w' has shape (3, 2), base has (2, 3). "
        "Exclude it, or use a checkpoint of the same base."
    )


def test_a_tensor_that_one_expert_lacks_is_refused() -> None:
    lacking = {"a": expert(1.0), "b": {"enc.w": torch.zeros(2, 3)}}
    assert "expert 'b' lacks tensor 'enc.b', which the base and other experts have" in refusal(BASE, lacking)
    assert "enc.b" not in task_vectors(BASE, lacking, exclude=["enc.b"])


def test_a_quantised_expert_is_refused() -> None:
    whole_numbers = expert(1.0) | {"enc.w": torch.zeros(2, 3, dtype=torch.int8)}
    assert "Quantised checkpoints cannot be merged" in refusal(BASE, {"a": whole_numbers})


def test_no_expert_and_empty_experts_are_refused() -> None:
    assert "no expert is given" in refusal(BASE, {})
    assert refusal(BASE, {"a": {}}) == "expert 'a' holds no tensor."
    assert "expert 'b' holds no tensor." in refusal(BASE, {"a": expert(1.0), "b": {}})
    assert "the base holds no tensor." in refusal({}, {"a": expert(1.0)})


def test_another_architecture_is_refused_with_names_of_both() -> None:
    message = refusal(BASE, {"a": {"conv1.weight": torch.zeros(3)}})
    assert "the base has 'enc.w', expert 'a' has 'conv1.weight'. Are they of one architecture?" in message


def test_an_exclude_pattern_that_fits_nothing_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"exclude: 'encw' fits no tensor of the base. Did you mean 'enc.w' or "):
        task_vectors(BASE, {"a": expert(1.0)}, exclude=["encw"])


def test_a_pattern_of_heads_that_fits_nothing_is_a_mistake() -> None:
    """A misspelt one would merge the classifiers of experts whose classes are not the same."""
    with pytest.raises(UsageError, match=r"heads: 'clas\*' fits no tensor of base or experts."):
        task_vectors(BASE, {"a": expert(1.0, **{"cls.w": torch.ones(1)})}, heads=["clas*"])
    assert "cls.w" in task_vectors(BASE, {"a": expert(1.0, **{"cls.w": torch.ones(1)})}, heads=["cls*"]).heads["a"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_with_tensor_and_task(bad: float, dtype: torch.dtype) -> None:
    wrong = {"w": torch.tensor([[0.0], [bad], [bad]]).to(dtype)}
    fine = {"w": torch.zeros(3, 1).to(dtype)}
    tvs = task_vectors(fine, {"cars": fine, "dtd": wrong})
    assert tvs.read("w", slice(0, 1)).shape == (2, 1, 1)  # sound rows can be read
    with pytest.raises(CheckpointError, match="expert 'dtd': tensor 'w' has 2 entries that are NaN or infinite"):
        tvs.read("w")
    with pytest.raises(CheckpointError, match="the base: tensor 'w' has 2 entries"):
        task_vectors(wrong, {"cars": fine})["w"]


def test_infinities_that_cancel_in_a_sum_are_refused() -> None:
    wrong = {"w": torch.tensor([float("inf"), -float("inf")])}
    with pytest.raises(CheckpointError, match="2 entries"):
        task_vectors({"w": torch.zeros(2)}, {"a": wrong})["w"]


def test_large_finite_values_are_no_infinity() -> None:
    huge = torch.full((4,), 3e38)
    assert task_vectors({"w": torch.zeros(4)}, {"a": {"w": huge}})["w"].tolist() == [huge.tolist()]
    half = torch.full((4,), 60000.0, dtype=torch.float16)
    assert task_vectors({"w": torch.zeros(4)}, {"a": {"w": half}})["w"].tolist() == [[60000.0] * 4]


def test_a_double_beyond_float32_is_refused_rather_than_turned_into_nan() -> None:
    base = {"w": torch.tensor([1e300], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match="the base: tensor 'w' has 1 entries"):
        task_vectors(base, {"a": base})["w"]


def test_experts_with_one_more_prefix_are_matched() -> None:
    experts = {"a": {f"bert.{n}": t for n, t in expert(1.0).items()} | {"classifier.weight": torch.ones(2, 3)}}
    tvs = task_vectors(BASE, experts)
    assert list(tvs) == ["enc.w", "enc.b"]
    assert list(tvs.heads["a"]) == ["classifier.weight"]
    assert own_names(tvs, "a") == {"enc.w": "bert.enc.w", "enc.b": "bert.enc.b", "steps": "bert.steps"}
    assert tvs.experts["a"]["enc.b"].tolist() == [1, 1, 1]


def test_experts_with_one_prefix_less_are_matched() -> None:
    base = {f"bert.{n}": t for n, t in BASE.items()}
    tvs = task_vectors(base, {"a": expert(1.0) | {"classifier.weight": torch.ones(2, 3)}})
    assert list(tvs) == ["bert.enc.w", "bert.enc.b"]
    assert list(tvs.heads["a"]) == ["classifier.weight"]


def test_only_and_of_choose_tasks_in_any_order() -> None:
    tvs = task_vectors(BASE, {"a": expert(1.0), "b": expert(2.0), "c": expert(4.0, head=torch.ones(1))})
    for chosen in (tvs, tvs.transform(lambda tau, site: 1 * tau)):
        picked = chosen.only(["c", "a"])
        assert picked.tasks == ("c", "a")
        assert picked["enc.b"].tolist() == [[4, 4, 4], [1, 1, 1]]
        assert list(picked.heads["c"]) == ["head"]
        assert chosen.of("b")["enc.b"].tolist() == [2, 2, 2]
    with pytest.raises(UsageError, match=r"no task 'carz'. Known: a, b, c."):
        tvs.only(["carz"])


def test_one_task_s_vector_does_not_open_the_others(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folders = {t: write_folder(tmp_path / t, expert(x)) for t, x in {"a": 1.0, "b": 2.0}.items()}
    broken = expert(1.0) | {"enc.b": torch.tensor([0.0, float("nan"), 0.0])}
    tvs = task_vectors(BASE, {**folders, "broken": broken})
    assert tvs.of("b")["enc.b"].tolist() == [2, 2, 2]


def test_transform_and_reduce_of_rows_are_rows_of_the_whole() -> None:
    tvs = task_vectors({"w": torch.zeros(4, 2)}, {"a": {"w": torch.arange(8.0).reshape(4, 2)}})
    for lazy, cut in ((tvs.transform(lambda tau, site: 2 * tau), (slice(None), slice(1, 3))),
                      (tvs.reduce(lambda tau, site: tau.sum(0)), (slice(1, 3),))):  # fmt: skip
        assert torch.equal(lazy.read("w", slice(1, 3)), lazy["w"][cut])
    centred = tvs.transform(lambda tau, site: tau - tau.mean(), elementwise=False)
    assert torch.equal(centred.read("w", slice(1, 3)), centred["w"][:, 1:3])


def test_spilled_task_vectors_are_the_same(tmp_path: Path) -> None:
    tvs: TaskVectors = task_vectors(BASE, {"a": expert(1.0), "b": expert(2.0)}).transform(lambda tau, site: 3 * tau)
    spilled = tvs.spill(tmp_path)
    assert spilled.tasks == tvs.tasks
    for name in tvs:
        assert torch.equal(spilled[name], tvs[name])
    assert torch.equal(spilled.read("enc.w", slice(1, 2)), tvs["enc.w"][:, 1:2])
    assert spilled.only(["b"])["enc.b"].tolist() == [[6, 6, 6]]


def test_the_fingerprint_changes_with_base_and_experts() -> None:
    prints = {
        task_vectors({"w": torch.tensor([b])}, {"a": {"w": torch.tensor([e])}}).fingerprint
        for b, e in [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0)]
    }
    assert len(prints) == 3


def test_the_fingerprint_changes_with_what_was_done_to_the_vectors(tmp_path: Path) -> None:
    """The state of a fit is found again by it: two ways to trim the same experts must not share one."""
    tvs = task_vectors({"w": torch.zeros(40)}, {"a": {"w": torch.arange(40.0)}})
    trimmed = [trim(tvs, keep=keep) for keep in (0.1, 0.5)]
    prints = [v.fingerprint for v in (tvs, *trimmed)]
    assert len(set(prints)) == 3
    assert trim(tvs, keep=0.1).fingerprint == prints[1]
    assert trimmed[0].spill(tmp_path).fingerprint != prints[0]


def test_materialise_computes_once() -> None:
    calls: list[str] = []

    def note(tau: Tensor, site: object) -> Tensor:
        calls.append("read")
        return tau.sum(0)

    held = materialise(task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}}).reduce(note))
    assert [held["w"].item(), held["w"].item()] == [1.0, 1.0]
    assert calls == ["read"]


@pytest.mark.parametrize("name", ["glue/sst2", "../cars", ""])
def test_a_task_name_that_is_no_folder_s_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="its name becomes a folder's"):
        task_vectors({"w": torch.zeros(2)}, {name: {"w": torch.ones(2)}})


def test_excluding_everything_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"nothing is left to merge: exclude \(\*\) names every tensor"):
        task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}}, exclude=["*"])


def test_one_task_of_some_tensors_has_these_tensors() -> None:
    tensors = {"v": torch.zeros(1), "w": torch.zeros(1)}
    some = task_vectors(tensors, {"a": tensors, "b": tensors}).only_names(["w"])
    assert list(some.of("a")) == list(some.only(["b"])) == ["w"]
