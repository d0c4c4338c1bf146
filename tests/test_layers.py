"""The block of a tensor, from the names of real architectures."""

import pytest

from calmerge._layers import Layer, layers


def blocks(pattern: str, count: int, *inside: str) -> list[str]:
    return [f"{pattern}.{i}.{name}" for i in range(count) for name in inside]


@pytest.mark.parametrize(
    ("stack", "inside", "outside"),
    [
        ("vision_model.encoder.layers", ["self_attn.q_proj.weight", "layer_norm1.bias"], ["visual_projection.weight"]),
        ("visual.transformer.resblocks", ["attn.in_proj_weight", "mlp.c_fc.weight"], ["visual.proj", "visual.conv1.w"]),
        ("vit.encoder.layer", ["attention.attention.query.weight"], ["vit.embeddings.cls_token", "vit.layernorm.bias"]),
        ("blocks", ["norm1.weight", "attn.qkv.weight"], ["pos_embed", "patch_embed.proj.weight", "head.weight"]),
        ("bert.encoder.layer", ["output.LayerNorm.weight"], ["bert.pooler.dense.weight", "classifier.weight"]),
        (
            "model.layers",
            ["input_layernorm.weight", "mlp.experts.7.up_proj.weight"],
            ["lm_head.weight", "model.norm.w"],
        ),
        ("transformer.h", ["ln_1.weight", "attn.c_attn.bias"], ["transformer.wte.weight", "transformer.ln_f.weight"]),
        ("h", ["ln_1.weight"], ["wpe.weight"]),
        ("0.auto_model.encoder.layer", ["attention.self.query.weight"], ["0.auto_model.embeddings.word.weight"]),
    ],
)
def test_blocks_of_known_architectures(stack: str, inside: list[str], outside: list[str]) -> None:
    found = layers([*blocks(stack, 12, *inside), *outside])
    for name in inside:
        assert found[f"{stack}.1.{name}"] == Layer(stack, 1, 12)
        assert found[f"{stack}.11.{name}"] == Layer(stack, 11, 12)
    assert not set(outside) & set(found)


T5 = [
    "shared.weight",
    *blocks("encoder.block", 3, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight",
    *blocks("decoder.block", 4, "layer.0.SelfAttention.q.weight", "layer.2.DenseReluDense.wi.weight"),
]


def test_t5_has_two_stacks_and_the_inner_number_is_no_depth() -> None:
    found = layers(T5)
    assert found["decoder.block.3.layer.0.SelfAttention.q.weight"] == Layer("decoder.block", 3, 4)
    assert found["encoder.block.2.layer.1.DenseReluDense.wi.weight"] == Layer("encoder.block", 2, 3)
    assert "shared.weight" not in found
    assert "encoder.final_layer_norm.weight" not in found


def test_a_decoder_may_go_on_where_its_encoder_ends_whatever_the_order_of_names() -> None:
    found = layers(sorted(T5), stacks="concat")
    assert found["encoder.block.0.layer.0.SelfAttention.q.weight"] == Layer("encoder.block", 0, 7)
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"] == Layer("decoder.block", 3, 7)


def test_towers_side_by_side_are_never_concatenated() -> None:
    towers = blocks("text_model.encoder.layers", 2, "mlp.w") + blocks("vision_model.encoder.layers", 3, "mlp.w")
    found = layers(towers, stacks="concat")
    assert found["text_model.encoder.layers.1.mlp.w"] == Layer("text_model.encoder.layers", 1, 2)
    assert found["vision_model.encoder.layers.0.mlp.w"] == Layer("vision_model.encoder.layers", 0, 3)


def test_one_block_is_a_stack_of_one() -> None:
    names = blocks("encoder.block", 1, "layer.0.q.weight", "layer.1.wi.weight")
    assert set(layers(names).values()) == {Layer("encoder.block", 0, 1)}


@pytest.mark.parametrize(
    "names",
    [
        ["head.0.weight", "head.1.weight"],  # linear layers in a row
        ["head.0.proj.weight", "head.2.proj.weight"],  # a gap
        ["a.0.left.weight", "a.1.right.weight"],  # nothing in common
        ["layer10.conv.weight", "w.01.norm.weight"],  # no number of its own
        [],
    ],
)
def test_what_is_no_stack_of_blocks(names: list[str]) -> None:
    assert layers(names) == {}
