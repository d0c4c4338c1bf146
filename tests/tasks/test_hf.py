"""Hugging Face classifiers: merged backbones give what transformers gives, and can be loaded again."""

from pathlib import Path

import pytest
import torch

from calmerge import DataError, add, average, export, open_checkpoint, save, task_vectors
from calmerge.suites.suite import load_suite
from calmerge.tasks.hf import open_suite


def test_expert_logits_are_those_of_transformers(tiny_suite: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tvs, tasks = open_suite(load_suite(tiny_suite))
    expert = tvs.experts["shapes"]
    ours = tasks.logits({n: expert.read(n) for n in expert if n in tvs.base.specs}, "shapes", "test")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_suite.parent / "experts" / "shapes").eval()
    inputs, _ = tasks.split("shapes", "test").batch(torch.arange(16))
    with torch.no_grad():
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=0, atol=1e-6)


def test_export_gives_a_model_that_transformers_opens(tiny_suite: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tvs, tasks = open_suite(load_suite(tiny_suite))
    delta = average(tvs)
    save(tmp_path / "merged", tvs, delta)
    export(tmp_path / "merged", "shapes", tmp_path / "shapes")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shapes").eval()
    assert model.config.id2label == {0: "disc", 1: "ring", 2: "star"}
    assert AutoTokenizer.from_pretrained(tmp_path / "shapes")("w0").input_ids
    merged = add(tvs.base, delta)
    inputs, _ = tasks.split("shapes", "test").batch(torch.arange(16))
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(tasks.logits(dict(merged), "shapes", "test"), expected, rtol=0, atol=1e-6)


def test_heads_are_kept_per_task_and_embeddings_are_the_base_s(tiny_suite: Path, tmp_path: Path) -> None:
    tvs, _ = open_suite(load_suite(tiny_suite))
    assert list(tvs.heads["shapes"]) == ["classifier.bias", "classifier.weight"]
    assert not any("embeddings" in name for name in tvs)
    save(tmp_path / "merged", tvs, average(tvs))
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(open_checkpoint(tmp_path / "merged")[name], tvs.base[name])


def test_a_head_of_the_wrong_width_is_an_error(tiny_suite: Path, tmp_path: Path) -> None:
    text = tiny_suite.read_text().replace("classes: [disc, ring, star]", "classes: [disc, ring, star, dot]")
    for path in tiny_suite.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "wide.yaml").write_text(text)
    with pytest.raises(DataError, match="'shapes': the head has 3 outputs, but 4 classes are named"):
        open_suite(load_suite(tmp_path / "wide.yaml"))


def test_an_expert_without_a_head_is_an_error(tiny_suite: Path, tmp_path: Path) -> None:
    tvs = task_vectors(tiny_suite.parent / "base", {"a": tiny_suite.parent / "base"}, repeated=True)
    from calmerge.tasks.hf import HuggingFaceModel

    with pytest.raises(DataError, match="'a': its expert has no head"):
        HuggingFaceModel(tvs, kind="sequence-classifier", classes={"a": ("x", "y")})


def test_features_are_what_the_head_is_given(tiny_suite: Path) -> None:
    """The head is one linear layer: its weights times the features are the logits."""
    tvs, tasks = open_suite(load_suite(tiny_suite))
    weights = tvs.expert("shapes")
    features, logits = tasks.features(weights, "shapes"), tasks.logits(weights, "shapes")
    head = tvs.heads["shapes"]
    torch.testing.assert_close(features @ head["classifier.weight"].T + head["classifier.bias"], logits)


def test_a_head_runs_alone(tiny_suite: Path) -> None:
    tvs, tasks = open_suite(load_suite(tiny_suite))
    found = tasks.outputs(tvs.expert("shapes"), "shapes")
    with torch.no_grad():
        torch.testing.assert_close(tasks.model.head(found.features, "shapes"), found.logits)  # type: ignore[attr-defined]
