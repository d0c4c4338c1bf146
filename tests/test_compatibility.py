"""Checkpoints that do not fit: found on opening, from headers, all mistakes together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge import CheckpointError, StateDict, open_checkpoint, task_vectors
from calmerge._compatibility import tokenizer_size, unfit
from calmerge._recipe_run import open_inputs
from calmerge.mergekit import load_mergekit

SMALL = Path(__file__).parent / "golden" / "mergekit" / "checkpoints" / "small"
UP = "model.layers.1.mlp.up_proj.weight"


def refusal(base: object, experts: dict[str, object], **options: object) -> str:
    with pytest.raises(CheckpointError) as e:
        task_vectors(base, experts, **options)  # type: ignore[arg-type]
    return str(e.value)


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ("badshape", f"expert 'a': tensor '{UP}' has shape (16, 24), base has (24, 16). Exclude it, or use"),
        ("deep", "expert 'a' has 3 layers in 'model.layers', base has 2. Models of different depth cannot be merged"),
        ("lost_shard", "model.safetensors.index.json: names 'model-00003-of-00003.safetensors', which is missing."),
        ("missing", f"expert 'a' lacks tensor '{UP}', which the base and other experts have. Exclude it, or use"),
        ("nowhere", f"expert 'a': no checkpoint at '{SMALL / 'nowhere'}'"),
        ("truncated", "ends at byte 12968, but the file has 11956: it is truncated. Download or copy it again."),
        (
            "wide",
            "expert 'a': 'lm_head.weight' has 36 rows, base has 32: their vocabularies differ (1 more likewise). "
            "Keep the base's with exclude: ['lm_head.weight', 'model.embed_tokens.weight'], or merge with a mergekit",
        ),
        ("base", f"expert 'a' is the base itself ({SMALL / 'base'}): its task vector is 0. Remove it, or name what"),
        ("ft2", f"expert 'b' is expert 'a' again ({SMALL / 'ft2'}). Remove one of the two; for more influence, give"),
    ],
)
def test_a_checkpoint_that_cannot_be_merged_is_refused_on_opening(damaged: str, says: str) -> None:
    assert says in refusal(SMALL / "base", {"a": SMALL / damaged, "b": SMALL / "ft2"})


@pytest.mark.parametrize("damaged", ["nan", "inf"])
def test_entries_that_are_no_numbers_are_refused_when_they_are_read(damaged: str) -> None:
    tvs = task_vectors(SMALL / "base", {"a": SMALL / damaged, "b": SMALL / "ft2"})
    with pytest.raises(CheckpointError, match=f"expert 'a': tensor '{UP}' has 1 entries that are NaN or infinite"):
        tvs[UP]


def test_tensors_of_any_architecture_are_merged() -> None:
    assert len(task_vectors(SMALL / "bias_base", {"a": SMALL / "bias_ft1"})) == 29


def test_all_mistakes_come_together_each_with_its_place() -> None:
    experts = {"a": SMALL / "lost_shard", "b": SMALL / "ft1", "c": SMALL / "truncated"}
    where = {"experts.a": "r.yaml:3", "experts.c": "r.yaml:5"}
    says = refusal(SMALL / "nowhere", experts, where=where).splitlines()
    assert says[0] == "3 mistakes:"
    assert says[1].startswith("  the base: no checkpoint at")
    assert says[2].startswith("  r.yaml:3: expert 'a': ")
    assert says[3].startswith("  r.yaml:5: expert 'c': ")
    experts = {"a": SMALL / "badshape", "b": SMALL / "ft1", "c": SMALL / "wide"}
    says = refusal(SMALL / "base", experts, where=where).splitlines()
    assert [line.split(":")[0] for line in says[1:]] == ["  r.yaml", "  r.yaml"]


def test_many_differences_of_one_kind_are_one_sentence() -> None:
    base = {f"w{i}": torch.zeros(2, 3) for i in range(9)}
    turned = {name: w.T for name, w in base.items()}
    assert "tensor 'w0' has shape (3, 2), base has (2, 3) (8 more likewise). Exclude them" in refusal(
        base, {"a": turned}
    )
    few = {"w8": torch.zeros(2, 3)}
    assert "expert 'b' lacks 8 tensors ('w0', 'w1', 'w2', ...), which the base" in refusal(base, {"a": base, "b": few})


def test_a_deeper_base_is_no_missing_tensor() -> None:
    """Without the check the base's last layer would stay under the merged ones."""
    says = refusal(SMALL / "deep", {"a": SMALL / "ft1", "b": SMALL / "ft2"})
    assert "expert 'a' has 2 layers in 'model.layers', base has 3." in says
    assert "lacks" not in says


def test_did_you_mean_another_folder(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    write_folder(tmp_path / "cars", {"w": torch.zeros(1)})
    assert "Did you mean 'cars'?" in refusal(tmp_path / "cars", {"a": tmp_path / "car"})


def test_one_checkpoint_under_two_paths_is_the_same(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    base, a = (write_folder(tmp_path / n, {"w": torch.full((3,), x)}, 1) for n, x in {"base": 0.0, "a": 1.0}.items())
    (tmp_path / "link").symlink_to(a)
    shutil.copytree(a, tmp_path / "copy")
    for other in ("link", "copy", "a/model.safetensors", "a/../a"):
        assert "expert 'b' is expert 'a' again" in refusal(base, {"a": a, "b": tmp_path / other})
        assert "expert 'b' is the base itself" in refusal(a, {"b": tmp_path / other})
    assert len(task_vectors(base, {"a": a, "b": tmp_path / "copy"}, repeated=True).tasks) == 2


def test_experts_that_differ_in_one_number_are_two(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folders = {n: write_folder(tmp_path / n, {"w": torch.tensor([0.0, x])}) for n, x in {"a": 1.0, "b": 2.0}.items()}
    assert task_vectors({"w": torch.zeros(2)}, folders)["w"].tolist() == [[0, 1], [0, 2]]


def test_tensors_in_memory_may_be_given_twice() -> None:
    w = {"w": torch.ones(1)}
    assert task_vectors(w, {"a": w, "b": w})["w"].tolist() == [[0.0], [0.0]]


INT = torch.zeros(2, 2, dtype=torch.int32)
BYTE = INT.to(torch.uint8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"q.qweight": INT, "q.qzeros": INT, "q.scales": torch.ones(2).half(), "q.g_idx": INT[0]},
        {"q.weight": INT.to(torch.int8), "q.SCB": torch.ones(2)},
        {"q.weight": BYTE, "q.weight.absmax": torch.ones(2), "q.weight.quant_map": torch.ones(2)},
        {"q.weight": BYTE, "q.weight.quant_state.bitsandbytes__nf4": BYTE[0]},
        {"q.weight": INT.to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.ones(1)},
        {"q.weight": INT.to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(1)},
        {"q.weight_packed": INT, "q.weight_scale": torch.ones(1)},
        {"mlp.experts.gate_up_proj_blocks": BYTE, "mlp.experts.gate_up_proj_scales": BYTE},
    ],
    ids=["gptq", "bnb8", "bnb4", "nf4", "fp8-block", "fp8", "compressed-tensors", "mxfp4"],
)
def test_quantised_checkpoints_are_known_by_their_tensors(
    tensors: dict[str, Tensor], tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path / "m", {name: tensor.clone() for name, tensor in tensors.items()})
    config = {"quantization_config": {"quant_method": "xyz"}, "_name_or_path": "org/full"}
    (folder / "config.json").write_text(json.dumps(config))
    expected = (
        "Use the original float16 or bfloat16 checkpoint (its config.json names 'org/full').",
        "is quantised (xyz, says its config.json): it has a tensor '",
    )
    plain = {"q.weight": torch.zeros(2, 2)}
    for says in (refusal(folder, {"a": plain}), refusal(plain, {"a": folder})):
        assert all(part in says for part in expected)


def test_a_scale_that_belongs_to_floating_weights_is_no_quantisation() -> None:
    weights = StateDict({"q.weight": torch.zeros(2, 2), "q.weight_scale": torch.ones(2), "steps": INT})
    assert list(unfit("the base", weights)) == []


def test_a_configuration_alone_makes_no_quantised_checkpoint(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """Weights that were dequantised often keep the entry."""
    folder = write_folder(tmp_path / "m", {"w": torch.zeros(2)})
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    assert len(task_vectors(folder, {"a": {"w": torch.ones(2)}})) == 1


def test_complex_tensors_must_be_excluded() -> None:
    base = {"w": torch.zeros(2), "freqs": torch.zeros(2, dtype=torch.complex64)}
    says = refusal(base, {"a": {"w": torch.ones(2)}})
    assert says.startswith("the base: tensor 'freqs' of type complex64, which cannot be merged. Exclude it (exclude: [")
    assert list(task_vectors(base, {"a": {"w": torch.ones(2)}}, exclude=["freqs"])) == ["w"]


def test_types_that_torch_lacks_are_refused_where_they_would_be_merged(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "four": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        }
    ).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    plain = {"w": torch.zeros(1), "four": torch.zeros(8)}
    assert "tensor 'four' of type F4, which torch cannot read." in refusal(plain, {"a": file})
    assert "the base: tensor 'four' of type F4, which torch cannot read." in refusal(file, {"a": plain})
    assert list(task_vectors(plain, {"a": file}, exclude=["four"])) == ["w"]


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter.safetensors")
    assert "the base" in refusal(tmp_path / "adapter.safetensors", {"a": {"w": torch.zeros(1)}})


def test_another_number_of_tokens_is_no_head() -> None:
    base = {"lm_head.weight": torch.zeros(32, 4), "w": torch.zeros(2)}
    wide = {"lm_head.weight": torch.zeros(36, 4), "w": torch.ones(2)}
    assert "'lm_head.weight' has 36 rows, base has 32: their vocabularies differ." in refusal(base, {"a": wide})


def test_the_sizes_of_the_tokenizers_are_named(tmp_path: Path) -> None:
    for name, tokens in {"base": 4, "a": 5}.items():
        (tmp_path / name).mkdir()
        save_file({"embed_tokens.weight": torch.zeros(tokens, 2)}, tmp_path / name / "model.safetensors")
        vocab = {f"t{i}": i for i in range(tokens)}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    says = refusal(tmp_path / "base", {"a": tmp_path / "a"})
    assert "(tokenizers: expert 'a' 5 tokens, base 4 tokens)" in says


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "b"}]}}, 2),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "c"}]}}, 3),
        ({"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 1}}, 2),
        ({"vocab.txt": "a\nb\n"}, 2),
        ({"tokenizer.json": [1], "vocab.json": 3}, None),
        ({"tokenizer.json": {"model": 3, "added_tokens": [3, None, []]}}, 3),
        ({}, None),
    ],
)
def test_tokens_are_counted_as_far_as_files_are_sound(
    files: dict[str, object], size: int | None, tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path / "m", {"w": torch.zeros(1)})
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert tokenizer_size(open_checkpoint(folder)) == size


def test_the_damaged_models_of_a_mergekit_configuration_are_named_together(tmp_path: Path) -> None:
    models = "".join(
        f"- {{model: {SMALL / name}, parameters: {{weight: 1}}}}\n" for name in ("truncated", "lost_shard")
    )
    (tmp_path / "c.yml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    with pytest.raises(CheckpointError) as e:
        open_inputs(load_mergekit(tmp_path / "c.yml"))
    assert "it is truncated" in str(e.value)
    assert "which is missing" in str(e.value)
