"""Layers under new numbers, towers side by side, and what the configuration says of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calmerge import CheckpointError, StateDict, UsageError
from calmerge._open import merged, open_recipe
from calmerge._recipe_run import run_recipe
from calmerge._save import checkpoints_behind
from calmerge._side_files import config_of, with_edits
from calmerge._stack import side_by_side, some_layers, stack_layers
from calmerge._weights import Weights
from calmerge.recipe import recipe_from_dict


def model(config: dict[str, Any], **stacks: int) -> Weights:
    """One tensor a layer, of stacks whose names have `_` for dots."""
    names = [f"{stack.replace('_', '.')}.{i}.ln.w" for stack, count in stacks.items() for i in range(count)]
    return with_edits(StateDict({n: torch.zeros(1) for n in names}), {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("stack", "config", "then"),
    [
        ("model_layers", {"num_hidden_layers": 3}, {"num_hidden_layers": 2}),
        ("model_layers", {"text_config": {"num_hidden_layers": 3}}, {"text_config": {"num_hidden_layers": 2}}),
        ("visual_blocks", {"n_layer": 3, "vision_config": {"depth": 3}}, {"n_layer": 3, "vision_config": {"depth": 2}}),
        ("encoder_block", {"num_layers": 3, "num_decoder_layers": 3}, {"num_layers": 2, "num_decoder_layers": 3}),
        ("decoder_block", {"num_layers": 3, "num_decoder_layers": 3}, {"num_layers": 3, "num_decoder_layers": 2}),
        ("model_decoder_layers", {"num_hidden_layers": 3}, {"num_hidden_layers": 2}),
        ("encoder_layer", {"encoder": {"n_layers": 3}, "decoder": {"n_layers": 3}},
         {"encoder": {"n_layers": 2}, "decoder": {"n_layers": 3}}),
        ("model_layers", {"num_hidden_layers": 4}, {"num_hidden_layers": 4}),
    ],
)  # fmt: skip
def test_the_configuration_tells_of_a_stack_in_its_own_place(
    stack: str, config: dict[str, Any], then: dict[str, Any]
) -> None:
    assert config_of(some_layers(model(config, **{stack: 3}), (1, 3))) == then


def test_lists_with_one_entry_a_layer_are_put_together() -> None:
    whole = model({"num_hidden_layers": 2, "layer_types": ["x", "y"], "other": [1, 2]}, h=2)
    lower = some_layers(whole, (0, 2))
    upper = with_edits(
        StateDict({"h.2.ln.w": torch.zeros(1)}), {"config.json": b'{"num_hidden_layers": 1, "layer_types": ["z"]}'}
    )
    found = config_of(stack_layers([lower, upper]))
    assert found == {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "other": [1, 2]}


def test_layers_of_models_without_a_configuration_are_counted() -> None:
    lower, upper = model({"num_hidden_layers": 2}, h=2), StateDict({"h.2.ln.w": torch.zeros(1)})
    assert config_of(stack_layers([lower, upper])) == {"num_hidden_layers": 3}


def test_each_tower_brings_its_number_of_layers() -> None:
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
    text, vision = model(config, text_h=2), some_layers(model(config, vision_h=2), (0, 1))
    assert config_of(side_by_side([text, vision])) == {
        "text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 1}
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Models a and b, filled with 1 and 2: two towers of two layers, and one tensor between them."""
    for name, x in (("a", 1.0), ("b", 2.0)):
        tensors = {f"{t}.h.{i}.ln.w": torch.full((4,), x) for t in ("text", "vision") for i in range(2)}
        (tmp_path / name).mkdir()
        save_file(tensors | {"between.w": torch.full((4,), x)}, tmp_path / name / "model.safetensors")
    return tmp_path


def test_towers_of_a_recipe_are_merged_or_taken_each_by_itself(folders: Path) -> None:
    towers = [
        {"tensors": ["text.*"], "base": None, "experts": {"a": "./a", "b": "./b"}, "merge": "average"},
        {"tensors": ["vision.*"], "model": "./b", "layers": [0, 1]},
        "./a",
    ]
    found = merged(recipe_from_dict({"towers": towers}, folder=folders))
    assert {name: tensor[0].item() for name, tensor in found.items()} == {
        "text.h.0.ln.w": 1.5, "text.h.1.ln.w": 1.5, "vision.h.0.ln.w": 2, "between.w": 1
    }  # fmt: skip


def test_a_tensor_of_no_tower_is_not_lost_in_silence(folders: Path) -> None:
    towers = [{"tensors": ["text.*"], "model": "./a"}, {"tensors": ["vision.*"], "model": "./b"}]
    with pytest.raises(CheckpointError, match=r"the tensor 'between\.w' fits no tower"):
        merged(recipe_from_dict({"towers": towers}, folder=folders))
    towers = [{"tensors": ["txet.*"], "model": "./a"}, {"model": "./b"}]
    with pytest.raises(UsageError, match=r"'txet\.\*' fits no tensor"):
        merged(recipe_from_dict({"towers": towers}, folder=folders))


@pytest.mark.parametrize("where", ["stack", "towers", "experts"])
def test_a_seed_reaches_the_merges_inside(folders: Path, where: str) -> None:
    inner = {"base": "./a", "experts": {"b": "./b"}, "merge": {"dare": {"rate": 0.5}}}

    def drawn(**seed: int) -> list[float]:
        data = {"stack": {"stack": [inner]}, "towers": {"towers": [inner]}}.get(where)
        data = data or {"base": "./a", "experts": {"x": inner}, "merge": "average"}
        return [x for t in merged(recipe_from_dict(data | seed, folder=folders)).values() for x in t.tolist()]

    assert drawn() != drawn(seed=7)
    inner["seed"] = 3  # a seed of its own stays
    assert drawn() == drawn(seed=7)


def test_side_files_are_those_of_the_largest_tower_wherever_it_stands() -> None:
    small, large = model({"of": "small"}, vision_h=1), model({"of": "large"}, text_h=2)
    assert config_of(side_by_side([small, large])) == config_of(side_by_side([large, small])) == {"of": "large"}


def test_models_of_one_name_are_both_told(folders: Path) -> None:
    (folders / "other").mkdir()
    shutil.copytree(folders / "b", folders / "other" / "a")
    recipe = recipe_from_dict({"towers": [{"tensors": ["text.*"], "model": "./other/a"}, "./a"]}, folder=folders)
    run_recipe(recipe, out=folders / "out")
    assert len(json.loads((folders / "out" / "report.json").read_text())["inputs"]) == 2


def test_a_folder_of_towers_tells_what_it_was_made_of(folders: Path) -> None:
    (folders / "b" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    towers = [{"tensors": ["text.*"], "model": "./b"}, {"tensors": ["between.*"], "model": "./b"}, "./a"]
    recipe = recipe_from_dict({"towers": towers}, folder=folders)
    assert len(checkpoints_behind(open_recipe(recipe).base)) == 2  # b stands in two towers, and is hashed once
    manifest = run_recipe(recipe, out=folders / "out")
    assert manifest["merged"] == 5
    found = json.loads((folders / "out" / "report.json").read_text())
    assert list(found["inputs"]) == ["a", "b"]
    assert found["title"] == "recipe: 3 towers"
    assert 'LlamaForCausalLM.from_pretrained("out")' in (folders / "out" / "README.md").read_text()
