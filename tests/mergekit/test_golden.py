"""Against mergekit 0.1.5: configurations and sampled outputs stored as plain data (tests/golden/mergekit)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calmerge import CalmergeError, open_checkpoint
from calmerge._chat import template_of
from calmerge._open import merged
from calmerge._recipe_run import open_inputs, run_recipe
from calmerge._side_files import config_of
from calmerge._tokens import vocabulary
from calmerge.mergekit import convert_file, load_mergekit
from calmerge.recipe import build, load_recipe

FOLDER = Path(__file__).parents[1] / "golden" / "mergekit"
STORED = json.loads((FOLDER / "cases.json").read_text())
CASES = STORED["cases"]
REJECTED = json.loads((FOLDER / "reject.json").read_text())
FINE = {"dtype_alias": 21, "single_file_model": 21, "unlisted_architecture_tensors": 29}
"""Configurations that mergekit cannot carry out, or only in part, and how many tensors come out here."""


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in mergekit's files start where one is."""
    monkeypatch.chdir(FOLDER)


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "config.yml").write_text(text)
        return tmp_path / "config.yml"

    return write


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(FOLDER / "cases.safetensors")


def sampled(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // 96) | 1]


@pytest.mark.parametrize("case", CASES)
def test_merges_as_mergekit_does(case: str, config, outputs: dict[str, Tensor]) -> None:
    said = CASES[case]
    ours = merged(load_mergekit(config(said["config"])))
    shapes = STORED["shapes"][said["shapes"]]
    assert {name: list(spec.shape) for name, spec in ours.specs.items()} == shapes
    for name in shapes:
        theirs = outputs[f"{said['output']}/{name}"]
        found = sampled(ours[name])
        assert found.dtype == theirs.dtype
        bound = said["tolerance"]["atol"] + said["tolerance"]["rtol"] * theirs.float().abs()
        right = (found.float() - theirs.float()).abs() <= bound
        right[said.get("ambiguous", {}).get(name, [])] = True
        assert right.all(), name
    wanted = {key: value for key, value in said["output_config"].items() if key != "dtype"}
    assert {key: config_of(ours)[key] for key in wanted} == wanted
    if "output_tokens" in said:
        assert list(vocabulary(case, ours)) == said["output_tokens"]
        assert template_of(ours) == said["chat_template"]


@pytest.mark.parametrize("case", REJECTED)
def test_refuses_what_a_careful_tool_refuses(case: str, config) -> None:
    path = config(REJECTED[case]["config"])
    if case in FINE:
        found = merged(load_mergekit(path))
        assert len([found[name] for name in found]) == FINE[case]
        return

    def carried_out() -> None:
        recipe = load_mergekit(path)
        tvs = open_inputs(recipe)
        delta = build(recipe)(tvs, None, None)
        assert [delta[name] for name in delta]

    with pytest.raises(CalmergeError):
        carried_out()


@pytest.mark.parametrize(
    "case", ["ties_density_gradient", "precedence", "passthrough_scale", "tokenizer_rules", "adapters_ties_with_full"]
)
def test_the_converted_recipe_gives_the_same_bytes(case: str, config, tmp_path: Path) -> None:
    path = config(CASES[case]["config"])
    run_recipe(load_recipe(path), out=tmp_path / "direct")
    (tmp_path / "elsewhere").mkdir()
    recipe = tmp_path / "elsewhere" / "recipe.yaml"
    recipe.write_text(convert_file(path, out=recipe))
    run_recipe(load_recipe(recipe), out=tmp_path / "converted")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "direct" / file).read_bytes() == (tmp_path / "converted" / file).read_bytes()


def test_the_written_folder_is_whole(config, tmp_path: Path) -> None:
    said = CASES["tokenizer_rules"]
    run_recipe(load_recipe(config(said["config"])), out=tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert config_of(found)["vocab_size"] == 72 == found.specs["model.embed_tokens.weight"].shape[0]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == said["chat_template"]
    assert list(vocabulary("out", found)) == said["output_tokens"]


def test_the_dtype_of_the_result_is_told_by_its_configuration(config, tmp_path: Path) -> None:
    run_recipe(load_recipe(config(CASES["tied_linear_float16"]["config"])), out=tmp_path / "out")
    assert config_of(open_checkpoint(tmp_path / "out"))["dtype"] == "float16"


def test_a_named_document_is_an_input_of_the_next(config) -> None:
    first = CASES["linear_normalized"]["config"].replace("dtype: float32", "dtype: bfloat16")
    second = """
merge_method: task_arithmetic
base_model: checkpoints/main/base
models:
- {model: blend, parameters: {weight: 1.0}}
- {model: checkpoints/main/ft3, parameters: {weight: 0.5}}
dtype: float32
"""
    ours = merged(load_mergekit(config(f"name: blend\n{first}---{second}")))
    name = "model.layers.1.mlp.down_proj.weight"
    base, ft1, ft2, ft3 = (
        open_checkpoint(f"checkpoints/main/{m}")[name].double() for m in ("base", "ft1", "ft2", "ft3")
    )
    blend = ((0.6 * ft1 + 0.3 * ft2 + 0.45 * ft3) / 1.35).bfloat16().double()  # as if written and read again
    expected = base + (blend - base) + 0.5 * (ft3 - base)
    torch.testing.assert_close(ours[name].double(), expected, rtol=0, atol=1e-6)
