"""What every doctest may use without importing it, and a tiny suite of Hugging Face classifiers for the tests."""

import csv
from pathlib import Path

import pytest
import torch

import calmerge
from calmerge._random import permutation, uniform

WORDS = [f"w{i}" for i in range(40)]
CLASSES = {"colours": ("red", "blue"), "shapes": ("disc", "ring", "star"), "sizes": ("small", "large")}


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, calmerge=calmerge, task_vectors=calmerge.task_vectors)


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite file with a tiny BERT, three experts that differ from it by noise, and texts of random words."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("suite")
    _write_base(folder / "base")
    for task, classes in CLASSES.items():
        _write_expert(folder / "base", folder / "experts" / task, task, classes)
        for split, n in {"pool": 24, "validation": 12, "test": 16}.items():
            _write_table(folder / f"{task}-{split}.csv", task, split, n, len(classes))
    tasks = "".join(
        f"  {task}: {{expert: experts/{task}, classes: [{', '.join(classes)}], pool: {task}-pool.csv, "
        f"validation: {task}-validation.csv, test: {task}-test.csv}}\n"
        for task, classes in CLASSES.items()
    )
    file = folder / "tiny.yaml"
    file.write_text(
        "suite: tiny\nversion: 1\nmodel: {kind: sequence-classifier, max_tokens: 16}\nbase: base\n"
        f"exclude: ['*embeddings*']\ntasks:\n{tasks}"
        "methods:\n  calm: {steps: 4, batch: 8, sequential: 1}\n  adamerging: {steps: 3, batch: 4}\n"
        "  adamerging_pp: {steps: 2, batch: 4}\n"
    )
    return file


def _write_base(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=45, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def _write_expert(base: Path, folder: Path, task: str, classes: tuple[str, ...]) -> None:
    from transformers import BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        base, id2label=dict(enumerate(classes)), label2id={c: i for i, c in enumerate(classes)}
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embeddings" not in name:
                p += 0.2 * (uniform(tuple(p.shape), task, name) - 0.5)
    model.save_pretrained(folder)
    BertTokenizerFast.from_pretrained(base).save_pretrained(folder)


def _write_table(path: Path, task: str, split: str, n: int, classes: int) -> None:
    with path.open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        for i in range(n):
            chosen = permutation(len(WORDS), task, split, i)[:6].tolist()
            rows.writerow([" ".join(WORDS[j] for j in chosen), i % classes])
