"""The making of experts, on a tiny BERT and a tiny ViT."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.utils.data import TensorDataset

from calmerge._errors import CheckpointError, DataError, FitError, UsageError
from calmerge._run import Run
from calmerge.suites.classifiers import accuracy, fit_linear, open_model, probe
from calmerge.suites.finetune import Finetune, finetune, make_experts
from calmerge.suites.suite import load_suite
from calmerge.suites.validity import complaints, validity
from calmerge.tasks.data import DatasetExamples, TextExamples, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "good", "fine", "bad", "poor", "the", "film", "was"]
TEXTS = ["the film was good", "the film was bad", "fine film", "poor film", "good", "bad", "was fine", "was poor"] * 4
LABELS = torch.tensor([0, 1] * 16)
CLASSES = ["positive", "negative"]
QUICK = Finetune(epochs=20, batch=8, lr=3e-3, head_lr=1e-2, autocast="none", train=("encoder.*", "pooler.*"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "base"
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(base: Path) -> TextExamples:
    return TextExamples(TEXTS, LABELS, load_tokenizer(base), max_tokens=8)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "base"
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def pixels(inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
    return {"pixel_values": inputs[0]}, inputs[1]


@pytest.fixture(scope="module")
def images() -> DatasetExamples:
    y = torch.tensor([0, 1] * 16)
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
    return DatasetExamples(TensorDataset(noise + y.reshape(-1, 1, 1, 1), y), unpack=pixels)


def test_a_text_expert_opens_again(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    record = finetune(
        base,
        tmp_path / "out",
        examples,
        examples,
        kind="sequence-classifier",
        classes=CLASSES,
        settings=QUICK,
    )
    assert record["validation_accuracy"] == 1.0
    assert json.loads((tmp_path / "out" / "expert.json").read_text())["classes"] == CLASSES
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "positive", 1: "negative"}
    assert accuracy(model, examples) == 1.0
    weights, start = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    changed = {name for name, w in start.items() if not torch.equal(w, weights[name])}
    assert changed == {name for name in start if "embeddings" not in name}
    assert not (tmp_path / "out.partial").exists()
    assert load_tokenizer(tmp_path / "out")("good")["input_ids"] == [2]


def test_same_seed_same_expert(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    one_epoch = Finetune(epochs=1, batch=8)

    def make(name: str, seed: int) -> dict[str, Tensor]:
        finetune(
            base,
            tmp_path / name,
            examples,
            None,
            kind="sequence-classifier",
            classes=CLASSES,
            settings=one_epoch,
            seed=seed,
        )
        return load_file(tmp_path / name / "model.safetensors")

    torch.manual_seed(1)
    a = make("a", 0)
    torch.manual_seed(2)
    b, c = make("b", 0), make("c", 1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["classifier.weight"], c["classifier.weight"])


def test_a_sentence_encoder_keeps_its_head_beside_it(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    finetune(base, tmp_path / "out", examples, examples, kind="sentence-encoder", classes=CLASSES, settings=QUICK)
    head = load_file(tmp_path / "out" / "head.safetensors")
    assert {name: tuple(w.shape) for name, w in head.items()} == {"head.weight": (2, 16), "head.bias": (2,)}
    model = open_model(tmp_path / "out", "sentence-encoder", CLASSES)
    assert torch.equal(model.state_dict()["head.weight"], head["head.weight"])
    assert accuracy(model, examples) == 1.0
    transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_head_first_freezes_the_head(tmp_path: Path, vit: Path, images: DatasetExamples) -> None:
    settings = Finetune(epochs=1, batch=8, lr=1e-3, head="first", train=("encoder.*", "*layer*"), autocast="none")
    finetune(vit, tmp_path / "a", images, images, kind="image-classifier", classes=["0", "1"], settings=settings)
    more = Finetune(**{**vars(settings), "epochs": 2})
    finetune(vit, tmp_path / "b", images, images, kind="image-classifier", classes=["0", "1"], settings=more)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a["classifier.weight"], b["classifier.weight"])
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed
    assert all("layer" in name for name in changed)
    assert (tmp_path / "a" / "preprocessor_config.json").is_file()
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert accuracy(model, images) == 1.0


def test_an_interrupted_training_leaves_the_old_expert(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "expert.json").write_text("{}")

    class Stop(Run):
        @contextmanager
        def track(self, label: str, total: float, unit: str = "it") -> Iterator[Any]:
            yield self

        def advance(self, n: float = 1, **info: object) -> None:
            raise KeyboardInterrupt

    stop = Stop()
    stop.progress = stop  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        finetune(base, tmp_path / "out", examples, None, kind="sequence-classifier", classes=CLASSES, run=stop)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["expert.json"]


def test_probe_is_a_fraction_of_the_test_split(base: Path, examples: TextExamples) -> None:
    assert probe(base, examples, examples, examples, kind="sentence-encoder", classes=CLASSES) == 1.0


def test_fit_linear_finds_the_optimum() -> None:
    x = torch.tensor([[1.0], [-1.0]])
    weight, bias = fit_linear(x, torch.tensor([0, 1]), 2, 0.1)
    # W = (w, -w): the loss log(1 + exp(-2 w)) + 0.1 w^2 is least where 0.2 w = 2 / (1 + exp(2 w)), at w = 1.0639
    assert torch.allclose(weight.flatten(), torch.tensor([1.0639, -1.0639]), atol=2e-3)
    assert bias.abs().max() < 1e-4


def test_unlabelled_examples_cannot_train(tmp_path: Path, base: Path) -> None:
    pool = TextExamples(TEXTS, None, load_tokenizer(base))
    with pytest.raises(DataError, match="have no labels"):
        finetune(base, tmp_path / "out", pool, None, kind="sequence-classifier", classes=CLASSES)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["bert.pooler.dense.bias"] = torch.full((16,), torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FitError, match="the loss is nan at step 0"):
        finetune(broken, tmp_path / "out", examples, None, kind="sequence-classifier", classes=CLASSES)
    assert not (tmp_path / "out").exists()


def test_nothing_to_train(tmp_path: Path, base: Path, examples: TextExamples) -> None:
    settings = Finetune(head="first", train=("decoder.*",))
    with pytest.raises(UsageError, match="no parameter of the model matches"):
        finetune(
            base,
            tmp_path / "out",
            examples,
            None,
            kind="sequence-classifier",
            classes=CLASSES,
            settings=settings,
        )


def test_a_base_that_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json"):
        open_model(tmp_path, "sequence-classifier", CLASSES)


def suite_at(folder: Path, base: Path) -> dict[str, Any]:
    shutil.copytree(base, folder / "base")
    table = pyarrow.table({"text": TEXTS, "label": [CLASSES[i] for i in LABELS.tolist()]})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    task = {"train": "train.parquet", "classes": CLASSES}
    return {
        "model": {"kind": "sequence-classifier", "max_tokens": 8},
        "base": "base",
        "tasks": {name: {**task, "expert": f"experts/{name}"} for name in ("a", "b")},
        "finetune": {"epochs": 1, "batch": 16},
    }


def test_experts_are_made_once_and_again_if_the_recipe_changes(tmp_path: Path, base: Path) -> None:
    suite = suite_at(tmp_path, base)
    expert = tmp_path / "experts" / "a" / "expert.json"
    made = make_experts(suite, tmp_path, ["a"])
    assert list(made) == ["a"]
    assert not (tmp_path / "experts" / "b").exists()
    before = expert.stat().st_mtime_ns
    make_experts(suite, tmp_path, ["a"])
    assert expert.stat().st_mtime_ns == before
    suite["tasks"]["a"]["finetune"] = {"epochs": 2}
    assert make_experts(suite, tmp_path, ["a"])["a"]["settings"]["epochs"] == 2
    assert expert.stat().st_mtime_ns != before


def test_validity_measures_every_reference(tmp_path: Path, base: Path) -> None:
    parts = suite_at(tmp_path, base)
    for task in parts["tasks"].values():
        task |= {"pool": "train.parquet", "validation": "validation.parquet", "test": "test.parquet"}
    for split in ("validation", "test"):
        shutil.copyfile(tmp_path / "train.parquet", tmp_path / f"{split}.parquet")
    parts |= {"suite": "tiny", "version": 1, "exclude": ["*embeddings*"], "finetune": {"epochs": 8, "lr": 3e-3}}
    parts["tasks"]["b"]["finetune"] = {"seed": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(parts))
    suite = load_suite(tmp_path / "tiny.yaml")
    made = make_experts(suite.data, suite.folder)
    found = validity(suite)
    assert list(found) == ["probe", "experts", "base", "average", "task_arithmetic", "ties", "tsv_m", "iso_c"]
    assert found["probe"] == {"a": 1.0, "b": 1.0}
    experts = {}
    for name in made:
        expert = open_model(tmp_path / "experts" / name, "sequence-classifier", CLASSES)
        experts[name] = accuracy(expert, TextExamples(TEXTS, LABELS, load_tokenizer(base)))
    assert found["experts"] == pytest.approx(experts, abs=0.04)  # one of them computes in bfloat16
    assert complaints(found)


def test_mistakes_in_a_suite(tmp_path: Path, base: Path) -> None:
    suite = suite_at(tmp_path, base)
    with pytest.raises(UsageError, match="no task 'c' in the suite"):
        make_experts(suite, tmp_path, ["c"])
    del suite["tasks"]["b"]["train"]
    with pytest.raises(DataError, match="task 'b': no `train` split"):
        make_experts(suite, tmp_path, ["b"])


def test_settings_out_of_range_are_refused() -> None:
    from calmerge._signature import check

    (found,) = check(Finetune, {"warmup": 10}, name="finetune")
    assert found.startswith("finetune.warmup must lie in [0, 1), got 10.")
    assert check(Finetune, {"epochs": 0}, name="finetune") == ["finetune.epochs must be at least 1, got 0."]
