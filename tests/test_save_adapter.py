"""Merges written as adapters: what becomes of each tensor, its error, and that it reads as what it was."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from calmerge import (
    Adapter,
    OutputError,
    UsageError,
    adapted,
    add,
    average,
    core_space,
    extract_lora,
    save_adapter,
    task_arithmetic,
    task_vectors,
    ties,
)
from calmerge._lora import Factors
from calmerge._random import uniform
from calmerge.cli import app
from calmerge.pieces.factorise import factorise
from calmerge.recipe import load_recipe, recipe_from_dict

GOLDEN = Path(__file__).parent / "golden" / "peft"
BASE = {
    "model.embed_tokens.weight": torch.zeros(9, 4),
    "model.q.weight": torch.zeros(6, 4),
    "model.q.bias": torch.zeros(6),
    "model.norm.weight": torch.ones(4),
    "model.scale": torch.ones(2),
}


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, key, shape) - 0.5


def expert(rank: int = 2) -> dict[str, Tensor]:
    """An expert with low-rank matrices, and everything else moved too."""
    moved = {name: t + noise(*t.shape, key=name) for name, t in BASE.items() if t.dim() == 1}
    matrices = {n: noise(t.shape[0], rank, key=n) @ noise(rank, 4, key=n) for n, t in BASE.items() if t.dim() == 2}
    return moved | matrices


def rows(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in manifest["modules"]}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


# Factors ---------------------------------------------------------------------------------------------------------


def test_the_error_is_what_the_missing_singular_values_hold() -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
    assert factorise(matrix).rank == 2
    cut = factorise(matrix, rank=1)
    assert (cut.norm, round(cut.error, 6), round(cut.energy, 6)) == (5.0, 0.6, 0.64)


@pytest.mark.parametrize(("energy", "rank"), [(0.64, 1), (0.65, 2), (1.0, 2)])
def test_energy_keeps_the_fewest_that_reach_it(energy: float, rank: int) -> None:
    assert factorise(torch.diag(torch.tensor([4.0, 3.0, 0.0])), energy=energy).rank == rank


def test_rank_and_energy_together_keep_what_both_allow() -> None:
    assert factorise(torch.eye(4), energy=1.0, rank=3).rank == 3
    assert factorise(torch.eye(4), energy=0.5, rank=3).rank == 2


def test_bfloat16_differences_are_taken_apart_in_float64() -> None:
    """The SVD of a bfloat16 matrix would be off by 1e-3."""
    matrix = (noise(40, 3) @ noise(3, 30)).bfloat16().float()
    assert factorise(matrix).error < 1e-6
    assert 1e-4 < factorise(matrix, dtype=torch.bfloat16).error < 1e-2  # the error is that of what is stored


def test_a_matrix_in_the_span_of_factors_is_taken_apart_there_and_others_are_not() -> None:
    left, right = noise(30, 2, key="l"), noise(2, 20, key="r")
    span = [Factors(left, right, 1.0)]
    inside, outside = left @ right, left @ right + 1e-3 * noise(30, 20)
    assert factorise(inside, within=span).rank == 2
    assert factorise(inside, within=span).error < 1e-6
    assert factorise(outside, within=span).rank == 20
    assert factorise(outside, within=span).error < 1e-6


# Writing ---------------------------------------------------------------------------------------------------------


def test_every_tensor_is_kept_or_named_with_its_norm(tmp_path: Path) -> None:
    tuned = expert()
    manifest = extract_lora(BASE, tuned, tmp_path / "out", rank=2)
    kinds = {name: (row["kind"], row["rank"]) for name, row in rows(manifest).items()}
    assert kinds == {
        "model.embed_tokens.weight": ("embedding", 2),
        "model.q.weight": ("linear", 2),
        "model.q.bias": ("full", None),
        "model.norm.weight": ("full", None),
        "model.scale": ("left out", None),
    }
    left_out = rows(manifest)["model.scale"]
    assert left_out["norm"] == pytest.approx((tuned["model.scale"] - 1).norm().item())
    assert left_out["error"] == 1
    again = adapted(BASE, tmp_path / "out")
    for name in BASE:
        expected = BASE[name] if name == "model.scale" else tuned[name]
        torch.testing.assert_close(again[name], expected, rtol=0, atol=1e-6)
    said = config(tmp_path / "out")
    assert said["target_modules"] == ["embed_tokens", "q"]
    assert said["modules_to_save"] == ["model.norm"]
    assert said["bias"] == "all"
    assert said["r"] == said["lora_alpha"] == 2


def test_full_tensors_may_be_left_out_but_not_silently(tmp_path: Path) -> None:
    manifest = extract_lora(BASE, expert(), tmp_path / "out", rank=2, full=False)
    assert {r["name"] for r in manifest["modules"] if r["kind"] == "left out"} == {
        "model.q.bias", "model.norm.weight", "model.scale"
    }  # fmt: skip
    assert rows(manifest)["model.norm.weight"]["norm"] > 0
    assert config(tmp_path / "out")["modules_to_save"] is None


def test_modules_that_are_saved_are_whole_and_one_with_a_new_bias_alone_keeps_that(tmp_path: Path) -> None:
    """PEFT asks for every tensor of a module in `modules_to_save`."""
    base = {f"{module}.{leaf}": torch.ones(3) for module in ("norm", "q") for leaf in ("weight", "bias")}
    moved = {"norm.weight": torch.zeros(3), "q.bias": torch.zeros(3)}
    extract_lora(base, base | moved, tmp_path / "out")
    said = config(tmp_path / "out")
    assert (said["modules_to_save"], said["bias"]) == (["norm"], "all")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): t[0].item() for name, t in stored.items()} == {
        "norm.weight": 0, "norm.bias": 1, "q.bias": 0
    }  # fmt: skip
    again = adapted(base, tmp_path / "out")
    assert {name: t[0].item() for name, t in again.items()} == {
        "norm.weight": 0, "norm.bias": 1, "q.weight": 1, "q.bias": 0
    }  # fmt: skip


def test_tensors_that_did_not_move_are_no_part_of_it(tmp_path: Path) -> None:
    tuned = dict(BASE) | {"model.q.weight": expert()["model.q.weight"]}
    extract_lora(BASE, tuned, tmp_path / "out", rank=2)
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        "base_model.model.model.q.lora_A.weight", "base_model.model.model.q.lora_B.weight"
    }  # fmt: skip


def test_a_fixed_rank_is_filled_with_zeros_so_that_all_modules_have_it(tmp_path: Path) -> None:
    manifest = extract_lora(BASE, expert(1), tmp_path / "out", rank=3)
    assert rows(manifest)["model.q.weight"]["rank"] == 1
    said = config(tmp_path / "out")
    assert (said["r"], said["rank_pattern"]) == (3, {})
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.model.q.lora_A.weight"
    ].shape == (3, 4)


def test_energy_gives_each_module_its_rank_and_its_scale_stays_one(tmp_path: Path) -> None:
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4), "c.weight": torch.zeros(4, 4)}
    tuned = {"a.weight": torch.eye(4), "b.weight": torch.diag(torch.tensor([1.0, 0, 0, 0])), "c.weight": torch.eye(4)}
    tuned["c.weight"] = tuned["b.weight"].flip(0)
    extract_lora(base, tuned, tmp_path / "out", energy=1.0)
    said = config(tmp_path / "out")
    assert (said["r"], said["rank_pattern"], said["alpha_pattern"]) == (1, {"a": 4}, {"a": 4})
    for name, expected in tuned.items():
        torch.testing.assert_close(adapted(base, tmp_path / "out")[name], expected)


def test_target_modules_are_whole_paths_where_their_ends_would_name_others(tmp_path: Path) -> None:
    base = {"x.q.weight": torch.zeros(2, 2), "y.q.weight": torch.zeros(2, 2)}
    extract_lora(base, base | {"x.q.weight": torch.ones(2, 2)}, tmp_path / "out", rank=1)
    assert config(tmp_path / "out")["target_modules"] == ["x.q"]


def test_the_head_of_an_only_expert_goes_along_and_those_of_several_are_named(tmp_path: Path) -> None:
    heads = {t: expert() | {"score.weight": torch.ones(2, 4)} for t in ("a", "b")}
    extract_lora(BASE, heads["a"], tmp_path / "one", rank=2)
    assert config(tmp_path / "one")["modules_to_save"] == ["model.norm", "score"]
    assert adapted(BASE, tmp_path / "one")["score.weight"].tolist() == [[1] * 4] * 2
    tvs = task_vectors(BASE, heads)
    manifest = save_adapter(tmp_path / "two", tvs, average(tvs), rank=2)
    assert [r["why"] for r in manifest["modules"] if r["name"] == "score.weight"] == ["head of 'a'", "head of 'b'"]


def test_tied_embeddings_are_kept_whole_with_a_copy_for_the_output_layer(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true, "vocab_size": 9}')
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    manifest = extract_lora(tmp_path / "base", expert(), tmp_path / "out", rank=2)
    assert rows(manifest)["model.embed_tokens.weight"]["kind"] == "full"
    said = config(tmp_path / "out")
    assert said["ensure_weight_tying"] is True
    assert said["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]
    tvs = task_vectors(tmp_path / "base", {"a": tmp_path / "out"})
    assert not tvs.heads["a"]


def test_gpt_2_s_weights_are_written_as_it_stores_them(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"h.c_attn.weight": torch.zeros(2, 6)}, tmp_path / "base" / "model.safetensors")
    tuned = {"h.c_attn.weight": noise(2, 1) @ noise(1, 6)}
    extract_lora(tmp_path / "base", tuned, tmp_path / "out", rank=1)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.h.c_attn.lora_A.weight"].shape == (1, 2)
    assert config(tmp_path / "out")["fan_in_fan_out"] is True
    found = adapted(tmp_path / "base", tmp_path / "out")["h.c_attn.weight"]
    torch.testing.assert_close(found, tuned["h.c_attn.weight"])


# Merges of adapters ----------------------------------------------------------------------------------------------


def golden() -> Any:
    return task_vectors(GOLDEN / "base", {a: GOLDEN / "adapters" / a for a in "abc"})


@pytest.mark.parametrize("method", [average, partial(task_arithmetic, scale=0.7), partial(core_space, inner=ties)])
def test_a_merge_in_the_adapters_span_is_written_exactly_with_their_ranks_together(method: Any, tmp_path: Path) -> None:
    tvs = golden()
    manifest = save_adapter(tmp_path / "out", tvs, method(tvs))
    again = task_vectors(GOLDEN / "base", {"out": tmp_path / "out"})
    for name, row in rows(manifest).items():
        assert row["rank"] <= sum(tvs.ranks(name))
        assert row["error"] < 1e-6
        torch.testing.assert_close(again[name][0], method(tvs)[name], rtol=0, atol=1e-6)


def test_ranks_and_scales_of_the_inputs_do_not_leak_into_the_output(tmp_path: Path) -> None:
    """A merged rsLoRA adapter must not be scaled by sqrt(rank) once more."""
    tvs = task_vectors(GOLDEN / "base", {a: GOLDEN / "adapters" / a for a in "rs"})
    save_adapter(tmp_path / "out", tvs, average(tvs))
    said = config(tmp_path / "out")
    assert (said["use_rslora"], said["r"]) == (False, said["lora_alpha"])
    assert said["base_model_name_or_path"] == "base"


def with_own_table(table: Tensor, *, key: str) -> Adapter:
    """An adapter of an embedding beside which PEFT saved a table."""
    rows, width = table.shape
    factors = {"e.lora_embedding_A": noise(2, rows, key=key), "e.lora_embedding_B": noise(width, 2, key=key + "b")}
    return Adapter(factors | {"e.base_layer.weight": table}, {"r": 2, "lora_alpha": 2})


def test_the_base_s_own_embedding_beside_factors_takes_no_rank(tmp_path: Path) -> None:
    """Factors of rank 4 are larger than the table, but no larger than those of the inputs."""
    base = {"e.weight": noise(5, 4), "q.weight": noise(4, 4)}
    tvs = task_vectors(base, {t: with_own_table(base["e.weight"], key=t) for t in "ab"})
    merged = average(tvs)
    manifest = save_adapter(tmp_path / "out", tvs, merged)
    assert [(r["name"], r["kind"], r["rank"]) for r in manifest["modules"]] == [("e.weight", "embedding", 4)]
    again = adapted(base, tmp_path / "out")["e.weight"]
    torch.testing.assert_close(again, base["e.weight"] + merged["e.weight"], rtol=0, atol=1e-6)


def test_another_embedding_beside_factors_is_kept_whole(tmp_path: Path) -> None:
    base = {"e.weight": noise(12, 8), "q.weight": noise(4, 4)}
    tvs = task_vectors(base, {t: with_own_table(noise(12, 8, key="other"), key=t) for t in "ab"})
    merged = average(tvs)
    manifest = save_adapter(tmp_path / "out", tvs, merged)
    assert [(r["name"], r["kind"], r["error"]) for r in manifest["modules"]] == [("e.weight", "full", 0.0)]
    assert config(tmp_path / "out")["modules_to_save"] == ["e"]
    assert torch.equal(adapted(base, tmp_path / "out")["e.weight"], base["e.weight"] + merged["e.weight"])
    with pytest.raises(UsageError, match="larger than the tensor"):
        save_adapter(tmp_path / "out2", tvs, merged, full=False)


def test_a_merge_outside_their_span_asks_for_a_rank(tmp_path: Path) -> None:
    tvs = golden()
    with pytest.raises(UsageError, match=r"its factors would be larger than the tensor .* Say a rank or an energy"):
        save_adapter(tmp_path / "out", tvs, ties(tvs, keep=0.2))
    assert not (tmp_path / "out").exists()
    manifest = save_adapter(tmp_path / "out", tvs, ties(tvs, keep=0.2), rank=4)
    assert 0.1 < rows(manifest)["model.layers.0.mlp.down_proj.weight"]["error"] < 1


def test_the_adapters_own_names_are_written_where_the_base_s_lack_their_first_part(tmp_path: Path) -> None:
    factors = {"model.q.lora_A.weight": noise(1, 4), "model.q.lora_B.weight": noise(6, 1)}
    tvs = task_vectors({"q.weight": torch.zeros(6, 4)}, {"a": Adapter(factors, {"r": 1, "lora_alpha": 1})})
    save_adapter(tmp_path / "out", tvs, average(tvs))
    assert "base_model.model.model.q.lora_A.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_kinds_of_the_inputs_are_kept(tmp_path: Path) -> None:
    """A convolution stays one, an embedding of any name too, a trained bias is a full one."""
    base = {"c.weight": torch.zeros(3, 2, 2, 2), "t.weight": torch.zeros(5, 4), "c.bias": torch.zeros(3)}
    factors = {
        "c.lora_A.weight": noise(1, 2, 2, 2),
        "c.lora_B.weight": noise(3, 1, 1, 1),
        "c.lora_B.bias": noise(3),
        "t.lora_embedding_A": noise(1, 5),
        "t.lora_embedding_B": noise(4, 1),
    }
    tvs = task_vectors(base, {"a": Adapter(factors, {"r": 1, "lora_alpha": 2})})
    save_adapter(tmp_path / "out", tvs, average(tvs))
    again = task_vectors(base, {"a": tmp_path / "out"})
    for name in base:
        torch.testing.assert_close(again[name], tvs[name])
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.c.lora_B.weight"].shape == (3, 1, 1, 1)
    assert stored["base_model.model.t.lora_embedding_A"].shape == (1, 5)


def test_dora_comes_out_as_full_rank_or_as_what_a_rank_holds_of_it(tmp_path: Path) -> None:
    base, factors = {"q.weight": noise(6, 4)}, {"q.lora_A.weight": noise(1, 4), "q.lora_B.weight": noise(6, 1)}
    factors["q.lora_magnitude_vector"] = noise(6).abs() + 1
    tvs = task_vectors(base, {"a": Adapter(factors, {"r": 1, "lora_alpha": 1, "use_dora": True})})
    assert tvs.ranks("q.weight") is None
    manifest = save_adapter(tmp_path / "out", tvs, average(tvs), rank=4)
    assert rows(manifest)["q.weight"]["error"] < 1e-6


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    for threads in (1, 3):
        tvs = golden()
        save_adapter(tmp_path / str(threads), tvs, average(tvs), rank=4, threads=threads)
    one, two = ((tmp_path / t / "adapter_model.safetensors").read_bytes() for t in "13")
    assert one == two


def stopping_after(n: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Factors are found n times, then the run is stopped; how many were found."""
    found: list[int] = []

    def counted(matrix: Tensor, **options: Any) -> Any:
        if len(found) == n:
            raise KeyboardInterrupt
        found.append(1)
        return factorise(matrix, **options)

    monkeypatch.setattr("calmerge._save_adapter.factorise", counted)
    return found


def write(path: Path, **options: Any) -> None:
    tvs = task_vectors(BASE, {"expert": expert()})
    save_adapter(path, tvs, tvs.of("expert"), recipe={"merge": ["average"]}, threads=1, **options)


def test_a_stopped_run_goes_on_from_the_factors_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "unbroken", rank=1)
    stopping_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    again = stopping_after(1, monkeypatch)
    write(tmp_path / "out", rank=1, resume=True)
    assert len(again) == 1
    assert sorted(f.name for f in (tmp_path / "out").rglob("*")) == sorted(
        f.name for f in (tmp_path / "unbroken").rglob("*")
    )
    assert all(f.read_bytes() == (tmp_path / "out" / f.name).read_bytes() for f in (tmp_path / "unbroken").iterdir())
    assert not list(tmp_path.glob(".out*"))


def test_factors_of_other_options_are_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", rank=1)
    with pytest.raises(OutputError, match="it was begun with another options of the adapter"):
        write(tmp_path / "out", rank=2, resume=True)


def test_factors_that_changed_since_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "unbroken", rank=1)
    stopping_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", rank=1)
    (kept,) = (tmp_path / ".out.partial" / "factors").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    monkeypatch.undo()
    write(tmp_path / "out", rank=1, resume=True)
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "unbroken" / n).read_bytes() for n in names)


def test_the_folder_is_no_input_s(tmp_path: Path) -> None:
    tvs = golden()
    with pytest.raises(OutputError, match="would overwrite expert 'a'"):
        save_adapter(GOLDEN / "adapters" / "a", tvs, average(tvs))


def test_what_reads_as_something_else_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calmerge import _save_adapter

    def spoiled(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
        save_file({n: t + (1 if "lora_B" in n else 0) for n, t in tensors.items()}, path, **more)

    monkeypatch.setattr(_save_adapter, "save_file", spoiled)
    tvs = golden()
    with pytest.raises(OutputError, match="reads as something else"):
        save_adapter(tmp_path / "out", tvs, average(tvs))
    assert not (tmp_path / "out").exists()


# Recipes and the command line ------------------------------------------------------------------------------------


def write_recipe(folder: Path, out: str, method: str = "average") -> Path:
    adapters = ", ".join(f"{a}: {GOLDEN / 'adapters' / a}" for a in "abc")
    (folder / "recipe.yaml").write_text(
        f"base: {GOLDEN / 'base'}\nexperts: {{{adapters}}}\nmerge: {method}\nout:\n{out}"
    )
    return folder / "recipe.yaml"


def test_a_recipe_may_ask_for_an_adapter(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "  path: out\n  adapter: {rank: 3}\n")
    result = CliRunner().invoke(app, ["merge", str(file), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "all together: norm" in result.output
    assert config(tmp_path / "out")["r"] == 3
    assert (tmp_path / "out" / "report.json").is_file()
    exact = write_recipe(tmp_path, "  path: exact\n  adapter: exact\n")
    assert CliRunner().invoke(app, ["merge", str(exact), "--quiet"]).exit_code == 0
    assert max(r["error"] for r in json.loads((tmp_path / "exact" / "calmerge.json").read_text())["modules"]) < 1e-6


def test_adapters_in_a_recipe_just_work(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "  path: out\n", "{core_space: {inner: {ties: {keep: 0.5}}}}")
    assert CliRunner().invoke(app, ["merge", str(file), "--quiet"]).exit_code == 0
    tvs = golden()
    found = task_vectors(GOLDEN / "base", {"out": tmp_path / "out"})
    expected = add(tvs.base, core_space(tvs, inner=partial(ties, keep=0.5)))
    for name in tvs:
        assert torch.equal(found.experts["out"][name], expected[name])


def test_a_dry_run_counts_the_adapters_bytes_not_those_of_full_models(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "  path: out\n  adapter: exact\n")
    result = CliRunner().invoke(app, ["merge", str(file), "--dry-run", "--json"])
    found = json.loads(result.output)
    tvs = golden()
    expected = sum(sum(tvs.ranks(n)) * sum(tvs.specs[n].shape) * 4 for n in tvs)
    assert found["writes"] == expected
    assert found["inputs"] == tvs.base.nbytes + sum(w.source.nbytes for w in tvs.experts.values())
    full = write_recipe(tmp_path, "  path: out\n")
    found = json.loads(CliRunner().invoke(app, ["merge", str(full), "--dry-run", "--json"]).output)
    assert (found["passes"], found["reads"]) == (1, found["inputs"])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("  path: out\n  adapter:\n    rank: 0\n", r"recipe.yaml:7: out.adapter.rank must be at least 1, got 0"),
        (
            "  path: out\n  adapter:\n    rnak: 4\n",
            r"recipe.yaml:7: out.adapter has no key 'rnak'. Did you mean 'rank'",
        ),
        (
            "  path: out\n  adapter:\n    energy: 95\n",
            r"recipe.yaml:7: out.adapter.energy must lie in \(0, 1\], got 95",
        ),
        ("  path: out\n  adapter: yes please\n", r"recipe.yaml:6: out.adapter must be "),
        ("  path: out\n  adapter: exact\n  shard: 5GB\n", r"recipe.yaml:7: out.shard is for full weights"),
    ],
)
def test_mistakes_in_what_an_adapter_should_be_have_their_lines(out: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(write_recipe(tmp_path, out))


def test_a_recipe_of_plain_data_may_ask_for_an_adapter_too() -> None:
    data = {"base": "b", "experts": {"a": "a"}, "merge": ["average"], "out": {"adapter": {"energy": 0.9}}}
    assert recipe_from_dict(data).out.adapter == {"energy": 0.9}


def test_extract_lora_prints_a_row_for_every_tensor(tmp_path: Path) -> None:
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(expert(), tmp_path / "tuned.safetensors")
    command = ["extract-lora", str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--rank", "2", "--quiet"])
    assert result.exit_code == 0, result.output
    for name in BASE:
        assert name in result.output
    assert "left out" in result.output
    result = CliRunner().invoke(app, [*command, str(tmp_path / "x"), "--energy", "0.9", "--json", "--quiet"])
    assert json.loads(result.output)["modules"][0]["energy"] >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "adapter.rank must be at least 1"),
        (["--energy", "95"], "For 95 % write 0.95"),
        (["--exact", "--rank", "2"], "--exact keeps everything"),
        (["--dtype", "int8"], "--dtype must be float32"),
        (["--exclude", "nonsense*"], "fits no tensor of the base"),
    ],
)
def test_mistakes_in_the_command_are_wrong_usage(options: list[str], message: str, tmp_path: Path) -> None:
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(expert(), tmp_path / "tuned.safetensors")
    files = [str(tmp_path / f) for f in ("base.safetensors", "tuned.safetensors", "out")]
    result = CliRunner().invoke(app, ["extract-lora", *files, "--quiet", *options])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
