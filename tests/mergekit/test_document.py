"""mergekit's YAML: what is accepted, and every mistake with its line."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calmerge import CalmergeError, UsageError
from calmerge._open import merged
from calmerge._yaml import parse
from calmerge.mergekit.convert import convert, convert_file, load_mergekit
from calmerge.mergekit.document import Module, read_document
from calmerge.mergekit.modules import module_of
from calmerge.mergekit.patterns import cases
from calmerge.mergekit.reference import read_reference
from calmerge.mergekit.settings import at_depth
from calmerge.recipe import load_recipe

TOWERS = (("text", 0.0), ("vision", 100.0))
HEAD = (
    "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: 1}}\n- {model: ./b, parameters: {weight: 1}}\n"
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders a, b and c: an embedding, layers of one weight each (3, 3 and 5), a norm."""
    for at, (name, depth) in enumerate({"a": 3, "b": 3, "c": 5}.items(), 1):
        (tmp_path / name).mkdir()
        tensors = {f"h.{i}.mlp.w": torch.full((2,), 10.0 * at + i) for i in range(depth)}
        tensors |= {"embed.w": torch.full((2,), 100.0 * at), "norm.w": torch.full((2,), 100.0 * at + 1)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as e:
        read_document(parse(text, "c.yml"))
    return str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            HEAD.replace("linear", "dare-ties"),
            "c.yml:1: no merge_method is called 'dare-ties'. Did you mean 'dare_ties'?",
        ),
        (HEAD + "normalize: true", "c.yml:5: 'normalize' is a parameter; write it under 'parameters:'"),
        (HEAD + "dtype: int4", "c.yml:5: no dtype is called 'int4'."),
        (HEAD + "embed_slerp: true", "c.yml:5: 'embed_slerp' is not read. Write 'tokenizer: {source: union}'"),
        (HEAD + "input_model_parameters: []", "Write each model's parameters under its entry in 'models'."),
        ("merge_method: linear\nmodels:\n- {model: ./a, weight: 1}", "c.yml:3: 'weight' is a parameter"),
        (
            "merge_method: linear\nmodels:\n- model: ./a\n  lora: [{path: ./b}]",
            "an adapter is part of the model's name",
        ),
        (
            "merge_method: passthrough\nslices:\n- sources:\n  - {model: ./a, layer_range: [0, -1]}",
            "c.yml:4: layer_range is [first, end]",
        ),
        (
            "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b, parameters: {t: 1}}]",
            "'t' of slerp is one for all models",
        ),
        ("gate_mode: hidden\nexperts: []", "Mixtures of experts (mergekit-moe) are not made here"),
        (HEAD + "tokenizer: {source: union}\ntokenizer_source: base", "c.yml:5: a merge has 'tokenizer' or"),
        (HEAD + "parameters: {weight: [{filter: x}]}", "c.yml:5: an entry of a list of filters is"),
        ("merge_method: []\nmodels: [{model: ./a}]", "c.yml:1: no merge_method is called '[]'."),
        ("merge_method: karcher\nmodels: [{model: null}]", "c.yml:2: an entry of models needs the key 'model'."),
    ],
)
def test_each_mistake_names_its_line(text: str, says: str) -> None:
    assert says in refusal(text)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat", "torch.bfloat16", "BF16"])
def test_usual_names_of_types_are_understood(dtype: str) -> None:
    assert read_document(parse(f"{HEAD}dtype: {dtype}", "c.yml")).dtype == "bfloat16"


def test_a_parameter_without_effect_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    text = HEAD.replace("linear", "nuslerp") + "parameters: {normalize: true, int8_mask: true}"
    with caplog.at_level(logging.WARNING, "calmerge"):
        read_document(parse(text, "c.yml"))
    assert [r.getMessage() for r in caplog.records] == [
        "c.yml:5: nuslerp has no parameter 'normalize'; it has no effect."
    ]


def test_a_gradient_has_its_last_value_in_the_last_layer() -> None:
    assert [at_depth([0, 0.3, 0.7, 1], i / 3) for i in range(4)] == pytest.approx([0, 0.3, 0.7, 1])
    assert at_depth([5], 1.0) == 5


def test_outside_the_layers_a_gradient_has_its_first_value(models: Path) -> None:
    (models / "c.yml").write_text(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: [1, 0]}}\n"
        "- {model: b, parameters: {weight: [0, 1]}}\n"
    )
    found = {name: tensor[0].item() for name, tensor in merged(load_mergekit("c.yml")).items()}
    assert found == {"embed.w": 100, "h.0.mlp.w": 10, "h.1.mlp.w": 16, "h.2.mlp.w": 22, "norm.w": 101}


def test_the_only_layer_of_a_slice_has_the_last_value(models: Path) -> None:
    (models / "c.yml").write_text(
        "merge_method: linear\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [1, 2], parameters: {weight: [1, 0]}}\n"
        "  - {model: b, layer_range: [1, 2], parameters: {weight: [0, 1]}}\n"
    )
    assert merged(load_mergekit("c.yml"))["h.0.mlp.w"][0] == 21


def test_layers_are_stacked_and_counted_anew(models: Path) -> None:
    (models / "a" / "config.json").write_text(
        '{"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "vocab_size": 2}'
    )
    (models / "c" / "config.json").write_text(
        '{"num_hidden_layers": 5, "layer_types": ["1", "2", "3", "4", "5"], "vocab_size": 2}'
    )
    (models / "c.yml").write_text(
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: c, layer_range: [3, 5]}]\n"
    )
    from calmerge._side_files import config_of

    found = merged(load_mergekit("c.yml"))
    assert {name: tensor[0].item() for name, tensor in found.items()} == {
        "embed.w": 100, "h.0.mlp.w": 10, "h.1.mlp.w": 11, "h.2.mlp.w": 33, "h.3.mlp.w": 34, "norm.w": 301
    }  # fmt: skip
    assert config_of(found) == {"num_hidden_layers": 4, "layer_types": ["x", "y", "4", "5"], "vocab_size": 2}


def test_filters_of_a_model_see_its_own_names_and_those_of_the_merge_the_new_ones(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (models / "c.yml").write_text(
        "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n"
        "  - {model: b, layer_range: [0, 2]}\n"
        "- sources:\n  - {model: a, layer_range: [0, 1]}\n"
        "  - model: b\n    layer_range: [1, 2]\n"
        "    parameters: {weight: [{filter: h.1, value: 3}, {filter: h.2, value: 0}]}\n"
        "  parameters: {normalize: [{filter: h.2, value: false}, {value: true}]}\n"
        "parameters: {weight: 1}\n"
    )
    assert merged(load_mergekit("c.yml"))["h.2.mlp.w"][0] == 10 + 3 * 21
    assert "c.yml:10: the filter 'h.2' has no effect, since it takes no tensor." in caplog.text


def test_a_filter_that_fits_no_model_is_a_mistake_but_one_of_a_tied_head_is_told(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = "[{filter: lm_head, value: 2}, {value: 1}]"
    (models / "c.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{weight: {entries}}}\n"
    )
    merged(load_mergekit("c.yml"))
    (models / "c.yml").write_text((models / "c.yml").read_text().replace("lm_head", "nrom"))
    with pytest.raises(UsageError, match=r"the filter 'nrom' fits no tensor\. Did you mean 'norm'\?"):
        load_mergekit("c.yml")


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_slices_are_rounded_once_to_the_type_of_the_whole(models: Path, out: str) -> None:
    for name, step in (("a", 1.0), ("b", 2**-12)):
        save_file({"h.0.mlp.w": torch.tensor([step], dtype=torch.bfloat16)}, models / name / "model.safetensors")
    piece = "{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}"
    head = f"merge_method: linear\ndtype: {out}\nparameters: {{weight: 1, normalize: false}}\n"
    (models / "c.yml").write_text(f"{head}slices: [{piece}, {piece}]\n")
    found = merged(load_mergekit("c.yml"))["h.1.mlp.w"]
    assert found.dtype == getattr(torch, out)
    assert found.item() == (1 if out == "bfloat16" else 1 + 2**-12)


def test_integers_are_copied(models: Path) -> None:
    for name, step in (("a", 1), ("b", 2)):
        save_file({"w": torch.ones(1) * step, "steps": torch.tensor([step])}, models / name / "model.safetensors")
    (models / "c.yml").write_text(HEAD)
    assert {k: v.item() for k, v in merged(load_mergekit("c.yml")).items()} == {"w": 1.5, "steps": 1}


def test_without_a_dtype_the_models_types_meet(models: Path) -> None:
    save_file({"w": torch.ones(1, dtype=torch.bfloat16)}, models / "a" / "model.safetensors")
    save_file({"w": torch.ones(1)}, models / "b" / "model.safetensors")
    (models / "c.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n"
    )
    assert convert("c.yml")["out"] == {"dtype": "float32"}


def test_names_of_models(models: Path) -> None:
    def read(text: str) -> str:
        found = read_reference(parse(text, "c.yml"), [])
        return f"{found.model} | {found.adapter}" if found else "nothing"

    (models / "x+y@z").mkdir()
    assert read("./x+y@z") == "./x+y@z | None"
    assert read("org/m@main+org/l@v2") == "org/m@main | org/l@v2"
    assert read("{model: {path: org/m, revision: main}, lora: {path: org/l}}") == "org/m@main | org/l"


def test_a_name_of_a_document_is_needed(models: Path) -> None:
    (models / "c.yml").write_text(f"{HEAD}---\n{HEAD}")
    with pytest.raises(UsageError, match="every document but the last needs a 'name'"):
        load_mergekit("c.yml")


def test_modules_are_told_by_names(models: Path) -> None:
    for name, x in (("a", 1.0), ("b", 3.0)):
        tensors = {f"{t}.h.{i}.ln.w": torch.full((1,), x) for t in ("text", "vision") for i in range(2)}
        save_file(tensors | {"projector.w": torch.full((1,), x)}, models / name / "model.safetensors")
    listed = "models: [{model: a}, {model: b}]"
    (models / "c.yml").write_text(
        f"merge_method: slerp\nbase_model: a\nmodules:\n  text: {{{listed}, parameters: {{t: [0, 1]}}}}\n"
        f"  vision: {{{listed}}}\nparameters: {{t: 0.5}}\n"
    )
    found = {name: tensor.item() for name, tensor in merged(load_mergekit("c.yml")).items()}
    assert found == {
        "projector.w": 2, "text.h.0.ln.w": 1, "text.h.1.ln.w": 3, "vision.h.0.ln.w": 2, "vision.h.1.ln.w": 2
    }  # fmt: skip
    (models / "c.yml").write_text((models / "c.yml").read_text().replace("vision:", "visoin:"))
    with pytest.raises(CalmergeError, match="no tensor belongs to a module 'visoin'"):
        load_mergekit("c.yml")


def test_modules_may_be_merged_from_different_models(models: Path) -> None:
    for name, x in (("a", 1.0), ("b", 3.0), ("c", 8.0)):
        (models / name).mkdir(exist_ok=True)
        tensors = {f"{t}.h.{i}.w": torch.full((1,), x) for t in ("text", "vision") for i in range(2)}
        save_file(tensors | {"projector.w": torch.full((1,), x)}, models / name / "model.safetensors")

    def found(method: str, *modules: str) -> dict[str, float]:
        (models / "c.yml").write_text(f"merge_method: {method}\nmodules:\n" + "".join(f"  {m}\n" for m in modules))
        return {name: tensor.item() for name, tensor in merged(load_mergekit("c.yml")).items()}

    def weighted(**weights: float) -> str:
        models = ", ".join(f"{{model: {name}, parameters: {{weight: {w}}}}}" for name, w in weights.items())
        return f"{{models: [{models}]}}"

    linear = found(
        "linear", f"text: {weighted(a=1, b=1)}", f"vision: {weighted(c=1, a=3)}", f"projector: {weighted(c=1)}"
    )
    assert linear == {
        "projector.w": 8,
        **{f"text.h.{i}.w": 2 for i in range(2)},
        **{f"vision.h.{i}.w": 2.75 for i in range(2)},
    }
    taken = found(
        "passthrough",
        "text: {models: [{model: b}]}",
        "vision: {models: [{model: c}]}",
        "projector: {models: [{model: a}]}",
    )
    assert taken == {
        "projector.w": 1,
        **{f"text.h.{i}.w": 3 for i in range(2)},
        **{f"vision.h.{i}.w": 8 for i in range(2)},
    }
    added = found(
        "task_arithmetic\nbase_model: a",
        f"text: {weighted(b=1)}",
        f"vision: {weighted(b=0.5, c=1)}",
        f"projector: {weighted(c=2)}",
    )
    assert added == {
        "projector.w": 15,
        **{f"text.h.{i}.w": 3 for i in range(2)},
        **{f"vision.h.{i}.w": 9 for i in range(2)},
    }
    with pytest.raises(UsageError, match="takes at least 1 besides base_model; here: none"):
        found("task_arithmetic\nbase_model: a", f"text: {weighted(b=1)}", f"vision: {weighted(a=1)}")


def test_modules_may_be_stacked_each_by_itself(models: Path) -> None:
    from calmerge._side_files import config_of

    for name, x in (("a", 10.0), ("b", 20.0)):
        tensors = {f"{t}.h.{i}.ln.w": torch.full((1,), x + i + y) for t, y in TOWERS for i in range(3)}
        tensors |= {f"{t}.{end}.w": torch.full((1,), x + y) for t, y in TOWERS for end in ("embed", "norm")}
        save_file(tensors | {"projector.w": torch.full((1,), x)}, models / name / "model.safetensors")
        (models / name / "config.json").write_text(
            '{"text_config": {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}, "vision_config": {"depth": 3}}'
        )
    (models / "c.yml").write_text(
        "merge_method: linear\nmodules:\n"
        "  text:\n    slices:\n    - sources: [{model: a, layer_range: [0, 2]}]\n"
        "    - sources: [{model: b, layer_range: [1, 3]}, {model: a, layer_range: [1, 3]}]\n"
        "  vision:\n    slices:\n    - sources: [{model: b, layer_range: [2, 3]}]\n"
        "parameters: {weight: 1}\n"
    )
    found = merged(load_mergekit("c.yml"))
    assert {name: tensor.item() for name, tensor in found.items()} == {
        "projector.w": 15, "text.embed.w": 10, "text.norm.w": 15, "vision.embed.w": 120, "vision.norm.w": 120,
        "text.h.0.ln.w": 10, "text.h.1.ln.w": 11, "text.h.2.ln.w": 16, "text.h.3.ln.w": 17, "vision.h.0.ln.w": 122,
    }  # fmt: skip
    assert config_of(found) == {
        "text_config": {"num_hidden_layers": 4, "layer_types": ["x", "y", "y", "z"]}, "vision_config": {"depth": 1}
    }  # fmt: skip
    (models / "r.yaml").write_text(convert_file("c.yml", out="r.yaml"))
    again = merged(load_recipe("r.yaml"))
    assert {name: tensor.item() for name, tensor in again.items()} == {n: t.item() for n, t in found.items()}


def test_a_module_that_is_taken_unchanged_is_a_model_of_the_recipe(models: Path) -> None:
    for name, x in (("a", 1.0), ("b", 3.0)):
        tensors = {f"{t}.h.{i}.ln.w": torch.full((1,), x) for t in ("text", "vision") for i in range(2)}
        save_file(tensors | {"projector.w": torch.full((1,), x)}, models / name / "model.safetensors")
    (models / "c.yml").write_text(
        "merge_method: passthrough\nmodules:\n  vision: {models: [{model: b}]}\n"
        "  text: {slices: [{sources: [{model: a, layer_range: [1, 2]}]}]}\n"
    )
    found = convert("c.yml")["towers"]
    assert found == [
        {"tensors": ["projector.w"], "model": "b"},
        {"tensors": ["*text*"], "model": "a", "layers": [1, 2]},
        {"model": "b"},
    ]


@pytest.mark.parametrize(
    ("module", "theirs", "others"),
    [
        ("text_decoder", "language_model.model.norm.weight", "multi_modal_projector.linear_1.weight"),
        ("text_decoder", "model.layers.0.mlp.up_proj.weight", "visual.blocks.0.norm1.weight"),
        ("text_decoder", "model.language_model.norm.weight", "model.visual.pos_embed.weight"),
        ("text_decoder", "lm_head.weight", "model.vision_tower.ln_pre.weight"),
        ("vision_tower", "visual.blocks.0.norm1.weight", "visual.merger.mlp.0.weight"),
        ("vision_model", "vision_model.model.norm.weight", "language_model.model.norm.weight"),
        ("multi_modal_projector", "model.visual.merger.norm.weight", "model.visual.blocks.0.norm1.weight"),
        ("shared", "lm_head.weight", "decoder.final_layer_norm.weight"),
        ("encoder", "model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
    ],
)
def test_modules_whose_tensors_are_called_otherwise(module: str, theirs: str, others: str) -> None:
    listed = [Module(module, (), {}, "c.yml:1"), Module("elsewhere", (), {}, "c.yml:2")]
    assert module_of(theirs, listed) is listed[0]
    assert module_of(others, listed).name == ""


def test_patterns_tell_every_group_apart() -> None:
    names = [f"h.{i}.{part}.w" for i in range(12) for part in ("attn.q", "attn.k", "mlp.up")] + ["norm.w"]
    groups: dict[int, list[str]] = {}
    for i, name in enumerate(names):
        groups.setdefault(hash((i * 7) % 5), []).append(name)
    from fnmatch import fnmatchcase

    ordered = cases(groups)
    for key, own in groups.items():
        for name in own:
            first = next(k for k, patterns in ordered if not patterns or any(fnmatchcase(name, p) for p in patterns))
            assert first == key
