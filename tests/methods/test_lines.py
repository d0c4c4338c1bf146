"""LiNeS: the traps and worked checks of its specification."""

import pytest
import torch
from torch import Tensor

from calmerge import average, lines, task_arithmetic, task_vectors, ties
from calmerge._task_vectors import TaskVectors


def clip(blocks: int) -> dict[str, Tensor]:
    """Names of a small CLIP vision tower, every tensor with one entry."""
    inside = [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(blocks)]
    outside = ["vision_model.embeddings.class_embedding", "vision_model.post_layernorm.weight", "visual_projection.w"]
    return {name: torch.zeros(1) for name in inside + outside}


def ones(base: dict[str, Tensor], tasks: int) -> TaskVectors:
    return task_vectors(base, {f"t{i}": {n: w + 1 for n, w in base.items()} for i in range(tasks)})


def test_eight_tasks_in_twelve_blocks() -> None:
    """alpha = 1/8 outside the blocks and in the first, final norm and projection too; alpha + beta in the last."""
    tvs = ones(clip(12), 8)
    scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.5)

    def scale(name: str) -> float:
        return scaled[name].item() / 8

    assert scale("vision_model.encoder.layers.0.mlp.fc1.weight") == 0.125
    assert scale("vision_model.encoder.layers.1.mlp.fc1.weight") == pytest.approx(0.170455, abs=1e-6)
    assert scale("vision_model.encoder.layers.6.mlp.fc1.weight") == pytest.approx(0.397727, abs=1e-6)
    assert scale("vision_model.encoder.layers.11.mlp.fc1.weight") == 0.625
    assert scale("vision_model.embeddings.class_embedding") == 0.125
    assert scale("vision_model.post_layernorm.weight") == scale("visual_projection.w") == 0.125


def test_without_a_slope_task_arithmetic_becomes_averaging() -> None:
    tvs = ones(clip(3), 4)
    scaled, mean = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.0), average(tvs)
    assert all(torch.equal(scaled[n], mean[n]) for n in mean)


def test_one_expert_with_alpha_1_is_itself_and_keeps_its_last_block() -> None:
    tvs = ones(clip(3), 1)
    kept = lines(tvs.of("t0"), tvs, alpha=1.0, beta=0.0)
    assert all(kept[n].item() == 1 for n in kept)
    restored = lines(tvs.of("t0"), tvs, alpha=0.25, beta=0.75)
    assert [restored[f"vision_model.encoder.layers.{i}.mlp.fc1.weight"].item() for i in range(3)] == [0.25, 0.625, 1]


def test_alpha_after_ties_is_a_ratio_of_l1_norms_not_1_over_t() -> None:
    """||sum||_1 = 4.48, ||merged||_1 = 2.40, T = 2: alpha = 0.93333; no lambda is applied on top."""
    one = {"A": torch.tensor([0.9, 0.8, -0.7, 0.6, 0.05]), "B": torch.tensor([0.04, -0.03, 0.02, 0.01, 0.0])}
    two = {"A": torch.tensor([-0.1, 0.5, -0.4, 0.02, 0.3]), "B": torch.tensor([-0.2, 0.01, 0.03, -0.04, 0.05])}
    tvs = task_vectors({"A": torch.zeros(5), "B": torch.zeros(5)}, {"one": one, "two": two})
    merged = ties(tvs, keep=0.2)
    torch.testing.assert_close(lines(merged, tvs)["A"], merged["A"] * 4.48 / 2.40 / 2)


def test_composition_on_ties_is_its_steps_by_hand() -> None:
    base = clip(3)
    experts = {t: {n: torch.tensor([(-1.0) ** (i * t) * (1 + i + t)]) for i, n in enumerate(base)} for t in (1, 2, 3)}
    tvs = task_vectors(base, {str(t): e for t, e in experts.items()})
    merged = ties(tvs, keep=0.5)
    alpha = sum(tvs[n].sum(0).abs().sum() for n in base) / sum(merged[n].abs().sum() for n in base) / 3
    scaled = lines(merged, tvs, beta=0.8)
    for name in base:
        block = int(name.split(".")[3]) if ".layers." in name else 0
        torch.testing.assert_close(scaled[name], merged[name] * (alpha + 0.8 * block / 2))


def t5(blocks: int) -> dict[str, Tensor]:
    parts = {"encoder": ["layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"]}
    parts["decoder"] = [*parts["encoder"], "layer.2.DenseReluDense.wi.weight"]
    names = [f"{s}.block.{i}.{n}" for s, inside in parts.items() for i in range(blocks) for n in inside]
    return {name: torch.zeros(1) for name in ["shared.weight", *names, "decoder.final_layer_norm.weight"]}


def test_the_inner_number_of_t5_is_no_depth() -> None:
    """By substrings `.0.` would put every self-attention of every block at depth 0."""
    tvs = ones(t5(4), 2)
    scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.5)
    assert scaled["decoder.block.3.layer.0.SelfAttention.q.weight"].item() == 2 * (0.5 + 0.5)
    assert scaled["encoder.block.0.layer.1.DenseReluDense.wi.weight"].item() == 2 * 0.5
    assert scaled["shared.weight"].item() == scaled["decoder.final_layer_norm.weight"].item() == 1


def test_a_decoder_may_go_on_after_its_encoder() -> None:
    tvs = ones(t5(2), 2)
    scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.75, stacks="concat")
    assert scaled["encoder.block.1.layer.0.SelfAttention.q.weight"].item() == pytest.approx(2 * (0.5 + 0.25))
    assert scaled["decoder.block.0.layer.0.SelfAttention.q.weight"].item() == pytest.approx(2 * (0.5 + 0.5))


def test_one_block_gets_alpha_and_beta() -> None:
    tvs = ones(clip(1), 2)
    scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.5)
    assert scaled["vision_model.encoder.layers.0.mlp.fc1.weight"].item() == 2 * (0.5 + 0.5)


def test_excluding_the_first_block_moves_no_other() -> None:
    base = clip(3)
    experts = {t: {n: w + 1 for n, w in base.items()} for t in "ab"}
    tvs = task_vectors(base, experts, exclude=["*layers.0.*"])
    scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.5)
    assert scaled["vision_model.encoder.layers.1.mlp.fc1.weight"].item() == 2 * (0.5 + 0.25)
