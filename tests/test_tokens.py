"""One vocabulary for models that have several: which ids tokens get, and which rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Whitespace

from calmerge._errors import CheckpointError
from calmerge._open import merged
from calmerge._side_files import json_file
from calmerge._tokens import vocabulary
from calmerge._weights import Weights
from calmerge.recipe import recipe_from_dict


@pytest.fixture(params=["WordLevel", "Unigram"])  # which keep their words as a mapping and as a list
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Models whose rows are [their number, id]: words, then special tokens behind them."""
    models: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "one": ("ab", ["<s>", "<x>"]),
        "two": ("bc", ["<s>", "<y>"]),
        "three": ("bcd", ["<s>"]),
    }
    for number, (name, (words, special)) in enumerate(models.items(), 1):
        known = ["<unk>", *words]
        if request.param == "WordLevel":
            tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
        else:
            tokenizer = Tokenizer(Unigram([(word, -1.0) for word in known], unk_id=0))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.add_special_tokens([AddedToken(one, special=True) for one in special])
        rows = torch.tensor([[float(number), float(i)] for i in range(tokenizer.get_vocab_size())])
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": len(rows)}))
        save_file({"embed_tokens.weight": rows}, tmp_path / name / "model.safetensors")
    return tmp_path


def made(folder: Path, experts: Sequence[str], *, base: str | None = None, **tokenizer: object) -> Weights:
    """The mean of some models (with a base: it plus the mean of their task vectors), with one vocabulary."""
    data = {
        "base": base and f"./{base}", "experts": {name: f"./{name}" for name in experts}, "merge": "average",
        "tokenizer": {"source": "union", **tokenizer},
    }  # fmt: skip
    return merged(recipe_from_dict(data, folder=folder))


def row(weights: Weights, token: str) -> list[float]:
    found: list[float] = weights["embed_tokens.weight"][vocabulary("merged", weights)[token]].tolist()
    return found


def test_ids_are_those_that_the_tokenizer_reads_though_special_tokens_stand_behind_the_words(folder: Path) -> None:
    weights = made(folder, ["one", "two"])
    read = Tokenizer.from_str(json.dumps(json_file(weights, "tokenizer.json")))
    assert read.get_vocab() == vocabulary("merged", weights)
    assert read.encode("a c <x> <y>").ids == [1, 5, 4, 6]
    assert read.token_to_id("<s>") == 3  # as in the first model


def test_words_of_all_models_come_before_what_was_added_to_any(folder: Path) -> None:
    found = list(vocabulary("merged", made(folder, ["one", "two", "three"])))
    assert found == ["<unk>", "a", "b", "<s>", "<x>", "c", "d", "<y>"]


def test_a_token_that_a_model_lacks_has_the_row_of_the_base(folder: Path) -> None:
    assert row(made(folder, ["one"], base="two"), "c") == [2, 2]
    assert row(made(folder, ["one", "two"], base="three"), "c") == [2.5, 2]  # the mean of [3, 2] and [2, 2]


def test_without_a_base_it_has_the_mean_of_all_rows_unless_one_model_is_preferred(folder: Path) -> None:
    assert row(made(folder, ["one", "two", "three"]), "c") == [2.5, 2]
    assert row(made(folder, ["one", "two", "three"], prefer="two"), "c") == [pytest.approx(7 / 3), 2]
    assert row(made(folder, ["one", "two", "three"], prefer="one"), "c") == [2.5, 2]  # has none itself


def test_the_model_that_is_preferred_has_to_be_one_of_them(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model of this merge is '.*/four'"):
        made(folder, ["one", "two"], prefer="./four")


@pytest.mark.parametrize("number", [-1, 5, 10**30])
def test_a_row_that_a_rule_numbers_has_to_be_there(folder: Path, number: int) -> None:
    tokens = {"a": {"source": {"kind": "model_token", "model": "two", "token_id": number}}}
    with pytest.raises(CheckpointError, match=r"has 5 rows, so token_id is from 0 to 4; got"):
        made(folder, ["one", "two"], tokens=tokens)
