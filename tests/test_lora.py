"""Adapters as experts: what each kind adds to its base, read in rows, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calmerge import (
    Adapter,
    CheckpointError,
    OutputError,
    adapted,
    add,
    average,
    open_checkpoint,
    save,
    task_arithmetic,
    task_vectors,
)
from calmerge._lora import product
from calmerge._random import uniform
from calmerge._weights import blocks

GOLDEN = Path(__file__).parent / "golden" / "peft"
A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0], [0.0]])
BA = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]])
BASE = {"q.weight": torch.ones(3, 2), "q.bias": torch.zeros(3), "norm.weight": torch.ones(2)}


def adapter(tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Adapter:
    given = {"q.lora_A.weight": A, "q.lora_B.weight": B} if tensors is None else tensors
    named = {f"base_model.model.{name}": t for name, t in given.items()}
    return Adapter(named, {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config)


def delta(one: Adapter, base: Mapping[str, Tensor] = BASE, name: str = "q.weight") -> Tensor:
    return task_vectors(base, {"a": one})[name][0]


def refusal(one: Adapter, base: Mapping[str, Tensor] = BASE) -> str:
    with pytest.raises(CheckpointError) as e:
        task_vectors(base, {"a": one})
    return str(e.value)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | config
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


# What an adapter adds ------------------------------------------------------------------------------------------


def test_the_task_vector_is_scale_times_b_times_a() -> None:
    assert delta(adapter(lora_alpha=3)).tolist() == (3 * BA).tolist()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 16, "lora_alpha": 32}, 2.0),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, 5.656854249492381),
        ({"r": 16, "lora_alpha": 32, "alpha_pattern": {"q": 8}}, 0.5),
        ({"r": 99, "lora_alpha": 32, "rank_pattern": {"q": 4}}, 8.0),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"layers.1.q": 1}}, 2.0),
    ],
)
def test_scale_follows_rslora_and_the_patterns(config: dict[str, Any], scale: float) -> None:
    rank = config.get("rank_pattern", {}).get("q", config["r"])
    factors = {
        "layers.0.q.lora_A.weight": torch.ones(rank, 2) / rank,
        "layers.0.q.lora_B.weight": torch.ones(3, rank),
    }
    base = {"layers.0.q.weight": torch.zeros(3, 2)}
    found = delta(adapter(factors, **config), base, "layers.0.q.weight")
    torch.testing.assert_close(found, torch.full((3, 2), scale))


def test_a_pattern_fits_the_end_of_a_module_s_path_not_part_of_a_name() -> None:
    one = adapter(alpha_pattern={"q": 5})
    assert one.config.scale_of("layers.0.q") == 5
    assert one.config.scale_of("layers.0.kq") == 1


def test_weights_stored_in_out_are_turned() -> None:
    base = {"q.weight": torch.zeros(2, 3)}
    assert delta(adapter(fan_in_fan_out=True), base).tolist() == BA.T.tolist()


def test_shapes_decide_what_is_stored_in_out_where_they_can() -> None:
    """PEFT decides by the module's class; `fan_in_fan_out` keeps what it found for the last module it looked at."""
    assert delta(adapter(), {"q.weight": torch.zeros(2, 3)}).tolist() == BA.T.tolist()
    assert delta(adapter(fan_in_fan_out=True)).tolist() == BA.tolist()


def test_a_square_weight_of_gpt_2_is_stored_in_out_whatever_the_configuration_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    base = {f"h.0.attn.{m}.weight": torch.zeros(2, 2) for m in ("c_proj", "lm")}
    save_file(base, tmp_path / "model.safetensors")
    factors = {f"{n.removesuffix('.weight')}.lora_{k}.weight": t for n in base for k, t in {"A": A, "B": B[:2]}.items()}
    tvs = task_vectors(tmp_path, {"a": adapter(factors)})
    assert tvs["h.0.attn.c_proj.weight"][0].tolist() == BA[:2].T.tolist()
    assert tvs["h.0.attn.lm.weight"][0].tolist() == BA[:2].tolist()


def test_the_update_of_an_embedding_is_turned_whatever_fan_in_fan_out_says() -> None:
    factors = {"e.lora_embedding_A": A, "e.lora_embedding_B": B}
    base = {"e.weight": torch.zeros(2, 3)}
    assert delta(adapter(factors), base, "e.weight").tolist() == BA.T.tolist()


def test_an_embedding_s_own_weight_beside_its_update_counts_once() -> None:
    """PEFT saves the base's embedding too where it is adapted; a resized one replaces the base's."""
    factors = {"e.lora_embedding_A": A, "e.lora_embedding_B": B, "e.base_layer.weight": torch.full((2, 3), 5.0)}
    base = {"e.weight": torch.full((2, 3), 4.0)}
    assert delta(adapter(factors), base, "e.weight").tolist() == (BA.T + 1).tolist()
    assert adapted(base, adapter(factors))["e.weight"].tolist() == (BA.T + 5).tolist()


def test_a_convolution_s_update_is_a_product_of_flattened_kernels() -> None:
    down = torch.arange(8.0).reshape(1, 2, 2, 2)
    factors = {"q.lora_A.weight": down, "q.lora_B.weight": B.reshape(3, 1, 1, 1)}
    found = delta(adapter(factors), {"q.weight": torch.zeros(3, 2, 2, 2)})
    assert found[1].tolist() == (3 * down[0]).tolist()
    assert "grouped" in refusal(adapter(factors), {"q.weight": torch.zeros(3, 1, 2, 2)})


def test_a_trained_bias_of_b_shifts_the_base_s_bias() -> None:
    factors = {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_B.bias": torch.tensor([1.0, 2.0, 3.0])}
    assert delta(adapter(factors, lora_alpha=2), name="q.bias").tolist() == [2, 4, 6]
    without = {"q.weight": torch.ones(3, 2)}
    assert "changes 'q.bias', which the base lacks" in refusal(adapter(factors), without)


def test_trained_biases_and_modules_to_save_replace_the_base_s() -> None:
    full = {
        "q.lora_A.weight": A,
        "q.lora_B.weight": B,
        "q.base_layer.bias": torch.tensor([1.0, 0.0, 0.0]),
        "norm.modules_to_save.default.weight": torch.tensor([3.0, 1.0]),
        "norm.original_module.weight": torch.tensor([1.0, 1.0]),
    }
    tvs = task_vectors(BASE, {"a": adapter(full, bias="all", modules_to_save=["norm"])})
    assert tvs["q.bias"][0].tolist() == [1, 0, 0]
    assert tvs["norm.weight"][0].tolist() == [2, 0]


def test_a_full_tensor_the_base_lacks_is_a_head() -> None:
    full = {"q.lora_A.weight": A, "q.lora_B.weight": B, "score.weight": torch.ones(5, 2)}
    tvs = task_vectors(BASE, {"a": adapter(full), "b": adapter()})
    assert {t: list(h) for t, h in tvs.heads.items()} == {"a": ["score.weight"], "b": []}
    assert list(tvs) == ["q.weight"]


def test_dora_rescales_every_output_to_its_magnitude() -> None:
    """W' = g (W + BA) / ||W + BA||: rows (2, 3), (4, 7), (1, 1) here."""
    factors = {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": torch.tensor([13.0**0.5, 0, 2])}
    found = delta(adapter(factors, use_dora=True))
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0], [-1.0, -1.0], [2**0.5 - 1, 2**0.5 - 1]]))


def test_dora_of_weights_stored_in_out_takes_its_norms_over_columns() -> None:
    factors = {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": torch.tensor([13.0**0.5, 0, 2])}
    base = {"q.weight": torch.ones(2, 3)}
    found = delta(adapter(factors, use_dora=True, fan_in_fan_out=True), base)
    expected = torch.tensor([[1.0, 2.0], [-1.0, -1.0], [2**0.5 - 1, 2**0.5 - 1]]).T
    torch.testing.assert_close(found, expected)


def test_magnitudes_are_not_ignored_when_the_configuration_forgets_dora() -> None:
    factors = {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": torch.ones(3)}
    with pytest.raises(CheckpointError, match="says DoRA: no, its file holds magnitudes: yes"):
        adapter(factors)
    with pytest.raises(CheckpointError, match="says DoRA: yes, its file holds magnitudes: no"):
        adapter(use_dora=True)


# How it is read ------------------------------------------------------------------------------------------------


def noisy(m: int, n: int, r: int, **more: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    factors = {
        "q.lora_A.weight": uniform((r, n), "A") - 0.5,
        "q.lora_B.weight": (uniform((m, r), "B") - 0.5).bfloat16(),
        **more,
    }
    return {"q.weight": uniform((m, n), "W").bfloat16()}, factors


@pytest.mark.parametrize("dora", [False, True])
def test_any_rows_have_the_bits_of_the_whole(dora: bool) -> None:
    """A product of one row is made by other machine code than one of many, and may be rounded otherwise."""
    more = {"q.lora_magnitude_vector": uniform((301,), "m") + 1} if dora else {}
    base, factors = noisy(301, 700, 24, **more)
    tvs = task_vectors(base, {"a": adapter(factors, r=24, lora_alpha=24, use_dora=dora)})
    assert tvs.elementwise
    whole = tvs["q.weight"]
    for size in (700, 5 * 700, 100 * 700):
        parts = [tvs.read(name, rows) for name, rows in blocks(tvs, size=size)]
        assert torch.equal(torch.cat(parts, 1), whole)
    exact = factors["q.lora_B.weight"].double() @ factors["q.lora_A.weight"].double()
    if not dora:
        torch.testing.assert_close(whole[0], exact.float(), rtol=1e-5, atol=1e-6)


def test_any_threads_have_the_same_bits() -> None:
    left, right = uniform((200, 64), "l"), uniform((64, 1500), "r")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(product(left, right))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_small_update_of_a_large_weight_is_not_rounded_away() -> None:
    """(W + BA) - W in float32 would lose it; the update is taken as it is."""
    base = {"q.weight": torch.full((3, 2), 2.0**20)}
    one = adapter(lora_alpha=2**-10)
    assert delta(one, base).tolist() == (BA * 2**-10).tolist()


def test_tensors_no_adapter_changes_are_neither_merged_nor_read() -> None:
    tvs = task_vectors(BASE, {"a": adapter()})
    assert list(tvs) == ["q.weight"]
    assert tvs.skipped == {"q.bias": "changed by no adapter", "norm.weight": "changed by no adapter"}


def test_a_module_that_another_expert_changes_counts_as_zero() -> None:
    other = adapter({"k.lora_A.weight": A, "k.lora_B.weight": B})
    tvs = task_vectors(BASE | {"k.weight": torch.zeros(3, 2)}, {"a": adapter(), "b": other})
    assert tvs["q.weight"][1].tolist() == [[0, 0]] * 3
    assert tvs["k.weight"][1].tolist() == BA.tolist()


def test_adapters_and_full_checkpoints_merge_together() -> None:
    full = {name: t + 1 for name, t in BASE.items()}
    tvs = task_vectors(BASE, {"a": adapter(), "b": full})
    assert tvs["q.weight"].tolist() == [BA.tolist(), [[1, 1]] * 3]
    assert tvs["norm.weight"].tolist() == [[0, 0], [1, 1]]


def test_an_adapted_base_is_a_model_and_takes_a_second_adapter() -> None:
    twice = adapted(adapted(BASE, adapter()), adapter(lora_alpha=2))
    assert twice["q.weight"].tolist() == (1 + 3 * BA).tolist()
    assert twice["norm.weight"] is BASE["norm.weight"]
    assert task_vectors(BASE, {"a": twice})["q.weight"][0].tolist() == (3 * BA).tolist()


def test_an_adapted_base_has_the_base_s_types_unless_told_otherwise() -> None:
    base = {"q.weight": torch.ones(3, 2).bfloat16()}
    assert adapted(base, adapter())["q.weight"].dtype == torch.bfloat16
    wide = adapted(base, adapter(lora_alpha=2**-10), dtype=torch.float32)
    assert wide["q.weight"][0, 0].item() == 1 + 2**-10
    assert wide.specs["q.weight"].dtype == torch.float32


@pytest.mark.parametrize(("own", "base"), [("model.q", "q"), ("q", "model.q"), ("model.q", "model.q")])
def test_one_leading_part_of_the_names_may_differ(own: str, base: str) -> None:
    one = adapter({f"{own}.lora_A.weight": A, f"{own}.lora_B.weight": B})
    assert delta(one, {f"{base}.weight": torch.zeros(3, 2)}, f"{base}.weight").tolist() == BA.tolist()


# Folders -------------------------------------------------------------------------------------------------------


def test_a_peft_folder_is_an_expert_like_any_other(tmp_path: Path) -> None:
    save_file(dict(BASE), tmp_path / "base.safetensors")
    folder = write_adapter(tmp_path / "cars", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    experts = {"cars": folder, "file": folder / "adapter_model.safetensors"}
    tvs = task_vectors(tmp_path / "base.safetensors", experts, repeated=True)
    assert tvs["q.weight"].tolist() == [BA.tolist(), BA.tolist()]
    manifest = save(tmp_path / "merged", tvs, average(tvs))
    assert set(manifest["inputs"]["expert cars"]) == {"adapter_model.safetensors", "adapter_config.json as read"}
    assert open_checkpoint(tmp_path / "merged")["q.weight"].tolist() == (1 + BA).tolist()
    with pytest.raises(OutputError, match="would overwrite expert 'cars'"):
        save(folder, tvs, average(tvs))


def test_old_adapters_in_bin_files_are_read_without_running_code(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "cars", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert task_vectors(BASE, {"cars": folder})["q.weight"][0].tolist() == BA.tolist()
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapter_config.json but no weights"):
        task_vectors(BASE, {"cars": folder})


def test_a_full_model_beside_an_adapter_s_configuration_is_a_full_model(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "cars", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    save_file(dict(BASE), folder / "model.safetensors")
    assert not isinstance(open_checkpoint(folder), Adapter)


def test_an_adapter_is_no_base() -> None:
    with pytest.raises(CheckpointError, match="the base is an adapter"):
        task_vectors(adapter(), {"a": BASE})
    with pytest.raises(CheckpointError, match="the base is an adapter"):
        adapted(adapter(), adapter())


def test_a_changed_configuration_changes_the_fingerprint() -> None:
    one, two = (task_vectors(BASE, {"a": adapter(lora_alpha=a)}).fingerprint for a in (1, 2))
    assert one != two


# What is refused -----------------------------------------------------------------------------------------------


def test_a_module_the_base_lacks_is_named() -> None:
    assert refusal(adapter(), {"k.weight": torch.zeros(3, 2)}).startswith(
        "adapter 'in memory' changes 'q.weight', which the base lacks."
    )


def test_another_shape_is_named() -> None:
    assert "by a tensor of shape (3, 2), base has (4, 2)" in refusal(adapter(), {"q.weight": torch.zeros(4, 2)})


def test_a_quantised_base_is_refused() -> None:
    assert "the base is quantised" in refusal(adapter(), {"q.weight": torch.zeros(3, 2, dtype=torch.uint8)})


def test_a_rank_that_the_configuration_does_not_say_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has rank 1 in A and 1 in B, and adapter_config.json says 4"):
        adapter(r=4)


def test_a_factor_without_its_partner_is_refused() -> None:
    with pytest.raises(CheckpointError, match="module 'q' lacks its lora_B"):
        adapter({"q.lora_A.weight": A})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VERA"}, "is of type VERA"),
        ({"init_lora_weights": "pissa_niter_16"}, "began as pissa_niter_16, which changed its base"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"r": 0}, "r and lora_alpha must be numbers"),
    ],
)
def test_kinds_that_are_no_product_over_the_base_are_refused_with_the_reason(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        adapter(**config)


def test_factors_of_unknown_variants_are_not_taken_for_full_tensors() -> None:
    with pytest.raises(CheckpointError, match="LoRA variant that is not read"):
        adapter({"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_diag.weight": torch.ones(1)})


def test_a_tied_output_layer_is_not_changed_behind_the_adapter_s_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    save_file({"embed.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    head = adapter({"lm_head.lora_A.weight": A, "lm_head.lora_B.weight": B})
    embedding = adapter({"embed.lora_embedding_A": A, "embed.lora_embedding_B": B})
    for one in (head, embedding):
        with pytest.raises(CheckpointError, match="Untie and save the base first"):
            task_vectors(tmp_path, {"a": one})
    allowed = {"ensure_weight_tying": True}
    both = adapter({"embed.lora_embedding_A": A, "embed.lora_embedding_B": B}, **allowed)
    assert task_vectors(tmp_path, {"a": both})["embed.weight"][0].tolist() == BA.T.tolist()


def test_nan_in_a_factor_is_refused_with_tensor_and_expert() -> None:
    bad = adapter({"q.lora_A.weight": torch.tensor([[float("nan"), 1.0]]), "q.lora_B.weight": B})
    with pytest.raises(CheckpointError, match=r"expert 'a': tensor 'q.weight' has 3 entries that are NaN or infinite"):
        delta(bad)


# Against PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cat", "rslora_cat"])
def test_weighted_sums_are_those_of_peft_s_own_deltas(case: str) -> None:
    said = json.loads((GOLDEN / "cases.json").read_text())["cases"][case]
    stored = load_file(GOLDEN / "cases.safetensors")
    tvs = task_vectors(GOLDEN / "base", {a: GOLDEN / "adapters" / a for a in said["adapters"]})
    weights = torch.tensor(said["weights"])
    for name in tvs:
        found = (weights[:, None, None] * tvs[name]).sum(0)
        expected = stored[f"{case}/exact_sum/{name.removesuffix('.weight')}"]
        torch.testing.assert_close(found, expected, rtol=0, atol=said["tolerance"]["atol"])


def test_a_merge_of_adapters_is_that_of_the_full_models_they_make() -> None:
    paths = {a: GOLDEN / "adapters" / a for a in "abc"}
    base = open_checkpoint(GOLDEN / "base")
    full = {a: {n: t.clone() for n, t in adapted(base, path).items()} for a, path in paths.items()}
    one, two = (task_vectors(base, experts) for experts in (paths, full))
    merged = [add(base, task_arithmetic(tvs, scale=0.4)) for tvs in (one, two)]
    for name in base:
        torch.testing.assert_close(merged[0][name], merged[1][name], rtol=0, atol=1e-6)
