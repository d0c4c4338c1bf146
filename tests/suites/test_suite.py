"""Suite files: what a right one becomes, and every mistake with its line."""

from pathlib import Path
from typing import Any

import pytest

from calmerge import UsageError
from calmerge._weights import Weights
from calmerge.suites.suite import embedded_suites, load_suite, missing_files

TEXT = """\
suite: pets
version: 2
title: Two tasks
model: {kind: sequence-classifier, max_tokens: 40}
base: base
exclude: ["*embeddings*"]
tasks:
  movies:
    title: Movie reviews
    expert: experts/movies
    input: text
    label: polarity
    classes: [negative, positive]
    train: data/movies/train.parquet
    pool: data/movies/pool.parquet
    validation: data/movies/validation.parquet
    test: data/movies/test.parquet
  digits:
    expert: someone/digits
    classes: [0, 1]
    pool: ag_news:train[:500]
    test: glue#sst2:validation
    finetune: {epochs: 9}
finetune: {epochs: 3, batch: 32, lr: 1e-4, schedule: cosine, head: fresh, train: ["*encoder*"]}
methods:
  fit: {steps: 50}
"""


def plain(tvs: "TaskVectors") -> Weights: ...  # noqa: F821


def fit(tvs: "TaskVectors", *, tasks: Any, steps: int = 100) -> Weights: ...  # noqa: F821


METHODS = {"plain": plain, "fit": fit}


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, *edits: tuple[str, str]) -> Path:
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "pets.yaml").write_text(text)
        return tmp_path / "pets.yaml"

    return write


def mistakes(path: Path) -> list[str]:
    with pytest.raises(UsageError) as e:
        load_suite(path, methods=METHODS)
    return [line.strip() for line in str(e.value).splitlines() if not line.endswith("mistakes:")]


def test_a_suite_is_read_whole(write, tmp_path) -> None:
    suite = load_suite(write(TEXT), methods=METHODS)
    movies = suite.tasks["movies"]
    assert (suite.name, suite.version, suite.title, suite.transductive) == ("pets", 2, "Two tasks", False)
    assert (suite.model.kind, suite.model.max_tokens) == ("sequence-classifier", 40)
    assert (suite.base, suite.folder, suite.exclude) == (tmp_path / "base", tmp_path, ["*embeddings*"])
    assert suite.experts == {"movies": tmp_path / "experts/movies", "digits": "someone/digits"}
    assert (movies.classes, movies.label) == (("negative", "positive"), "polarity")
    assert movies.pool == tmp_path / "data/movies/pool.parquet"
    assert suite.finetune is not None
    assert (suite.finetune.lr, suite.finetune.train) == (1e-4, ("*encoder*",))
    assert suite.methods == {"fit": {"steps": 50}}
    assert suite.data["tasks"]["movies"]["expert"] == "experts/movies"


def test_a_misspelt_key_is_named_beside_what_is_missing(write) -> None:
    assert mistakes(write(TEXT, ("base: base", "bse: base"))) == [
        "pets.yaml:5: suite has no key 'bse'. Did you mean 'base'?",
        "pets.yaml:1: suite needs the key 'base' (path or text).",
    ]


def test_ids_and_classes_by_number(write) -> None:
    digits = load_suite(write(TEXT), methods=METHODS).tasks["digits"]
    assert digits.classes == ("0", "1")
    assert (digits.pool, digits.test) == ("ag_news:train[:500]", "glue#sst2:validation")
    assert (digits.label, digits.input, digits.finetune) == ("label", None, {"epochs": 9})


def test_all_mistakes_are_reported_together(write) -> None:
    path = write(
        TEXT,
        ("version: 2", "version: 0"),
        ("sequence-classifier", "sequence-clasifier"),
        ("label: polarity", "lable: polarity"),
        ("epochs: 3", "epoch: 3"),
        ("steps: 50", "step: 50"),
    )
    assert mistakes(path) == [
        "pets.yaml:4: model.kind must be 'sequence-classifier' or 'image-classifier' or 'sentence-encoder', "
        "got 'sequence-clasifier'. Did you mean 'sequence-classifier' or 'image-classifier'?",
        "pets.yaml:24: finetune has no key 'epoch'. Did you mean 'epochs'?",
        "pets.yaml:12: task 'movies' has no key 'lable'. Did you mean 'label'?",
        "pets.yaml:2: suite.version must be at least 1, got 0.",
        "pets.yaml:26: fit has no option 'step'. Did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("suite: pets\n", "", "pets.yaml:1: suite needs the key 'suite' (text)."),
        ("suite: pets", "suite: ../pets", "pets.yaml:1: a suite called '../pets': its name becomes a folder's"),
        ("base: base\n", "", "suite needs the key 'base' (path or text)."),
        ("exclude: [", "exclude: [3, ", "suite.exclude must be a list of text; entry 1 must be text, got 3."),
        ("  movies:", "  ../x:", "task '../x': its name becomes a folder's"),
        ("classes: [0, 1]", "classes: [0]", "pets.yaml:20: task 'digits' needs at least two classes, got 1."),
        ("classes: [0, 1]", "classes: [0, 0]", "pets.yaml:20: task 'digits' names the class '0' twice."),
        ("classes: [0, 1]", "classes: cat", "pets.yaml:20: task 'digits'.classes must be a list of text, got 'cat'."),
        ("    pool: ag_news:train[:500]\n", "", "pets.yaml:18: task 'digits' needs the key 'pool' (path or text)."),
        ("    test: glue#sst2:validation\n", "", "pets.yaml:18: task 'digits' needs a test split for its score."),
        ("  fit: {steps: 50}", "  fti: {}", "pets.yaml:26: no method is called 'fti'. Did you mean 'fit'?"),
        ("  fit: {steps: 50}", "  fit: 50", "pets.yaml:26: the options of fit must be a mapping."),
        ("version: 2", "version: 2\nmake: os", "pets.yaml:3: only the suites that come with calmerge can name code"),
        ("max_tokens: 40", "max_tokens: 0", "pets.yaml:4: model.max_tokens must be at least 1, got 0."),
        ("{epochs: 9}", "{epocs: 9}", "pets.yaml:23: finetune has no key 'epocs'. Did you mean 'epochs'?"),
        (
            "finetune: {epochs: 3, ",
            "finetune: {epochs: three, ",
            "finetune.epochs must be a whole number, got 'three'.",
        ),
    ],
)
def test_each_mistake_names_its_line(write, old: str, new: str, says: str) -> None:
    found = mistakes(write(TEXT, (old, new)))
    assert len(found) == 1
    assert says in found[0]


def test_a_pool_of_test_inputs_must_be_asked_for(write) -> None:
    path = write(TEXT, ("pool: data/movies/pool.parquet", "pool: data/movies/test.parquet"))
    assert mistakes(path) == [
        "pets.yaml:15: task 'movies' has its test split as pool, so methods would learn from the inputs they are "
        "tested on. Name another pool, or state 'transductive: true' at the top of the file."
    ]
    path = write(path.read_text(), ("version: 2", "version: 2\ntransductive: true"))
    assert load_suite(path, methods=METHODS).transductive


@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_other_split_may_be_the_test_split(write, split: str) -> None:
    path = write(TEXT, (f"{split}: data/movies/{split}.parquet", f"{split}: data/movies/test.parquet"))
    path.write_text(path.read_text() + "transductive: true\n")
    assert f"has its test split as {split} too" in mistakes(path)[0]


def test_a_suite_that_is_no_mapping(write) -> None:
    assert mistakes(write("- a\n")) == [
        "pets.yaml:1: a suite is a mapping with the keys suite, version, model, base, tasks."
    ]
    assert "'tasks' must be a mapping" in mistakes(write(TEXT.split("tasks:")[0] + "tasks: []\n"))[0]


def test_files_that_are_missing_are_named(write, tmp_path) -> None:
    suite = load_suite(write(TEXT.replace("data/movies/train.parquet", "train.csv")), methods=METHODS)
    found = missing_files(suite)
    assert [line.split(" is missing: ")[0] for line in found] == [
        "pets.yaml:5: the base",
        "pets.yaml:14: the train split of task 'movies'",
        "pets.yaml:15: the pool split of task 'movies'",
        "pets.yaml:16: the validation split of task 'movies'",
        "pets.yaml:17: the test split of task 'movies'",
    ]  # the expert can be made


def test_an_expert_that_cannot_be_made_is_missing(write) -> None:
    path = write(TEXT, ("    train: data/movies/train.parquet\n", ""), ("experts/movies", "./experts/movies"))
    assert any(
        "the expert of task 'movies' is missing" in line for line in missing_files(load_suite(path, methods=METHODS))
    )


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="no suite is called 'txt', and no file is there"):
        load_suite("txt")


@pytest.mark.parametrize("name", sorted(embedded_suites()))
def test_embedded_suites_are_sound(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CALMERGE_CACHE", str(tmp_path))
    suite = load_suite(name)
    assert suite.name == name
    assert suite.make == f"calmerge.suites.{name}"
    assert suite.folder == tmp_path / "suites" / f"{name}-v{suite.version}"
    assert isinstance(suite.base, Path)
    assert not suite.transductive
