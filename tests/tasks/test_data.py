"""Reading of task data: what comes out, and one sentence for everything that can be wrong."""

import io
import json
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from calmerge._errors import DataError, UsageError
from calmerge.tasks.data import DatasetExamples, TextExamples, class_ids, from_loader, read_columns, read_examples
from calmerge.tasks.images import ImageExamples, image_tensor, preprocessing
from calmerge.tasks.tables import read_table

PLAIN = {"num_channels": 1, "do_resize": False, "do_normalize": False}
PETS = ["cat", "dog"]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "small", "cat", "dog", "barks"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def png(value: int, size: tuple[int, int] = (2, 2), mode: str = "L") -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_three_table_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label,other\n"a, cat",0,x\na dog,1,y\n')
    (tmp_path / "t.tsv").write_text("text\tlabel\na, cat\t0\na dog\t1\n")
    (tmp_path / "t.jsonl").write_text('{"text": "a, cat", "label": 0}\n\n{"text": "a dog", "label": "dog"}\n')
    write_parquet(tmp_path / "t.parquet", text=["a, cat", "a dog"], label=[0, 1])
    for name in ("t.csv", "t.tsv", "t.jsonl", "t.parquet"):
        texts, labels = read_columns(tmp_path / name, "text", "label", PETS)
        assert texts == ["a, cat", "a dog"]
        assert labels is not None
        assert labels.tolist() == [0, 1]


def test_a_pool_never_reads_its_label_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pool.parquet", text=["a cat"], label=["impossible"])
    assert read_columns(file, "text") == (["a cat"], None)
    assert list(read_table(file, ["text"])) == ["text"]


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"tran.csv: no such file. Did you mean 'train.csv'\?"):
        read_columns(tmp_path / "tran.csv", "text")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none does not exist either"):
        read_columns(str(tmp_path / "none" / "train.csv"), "text")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(DataError, match=r"do not know how to read '.xlsx' files. Expected one of .csv"):
        read_columns(tmp_path / "t.xlsx", "text")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_unknown_column(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        file.write_text("text,lable\na,1\n")
    elif suffix == "jsonl":
        file.write_text('{"text": "a", "lable": 1}\n')
    else:
        write_parquet(file, text=["a"], lable=[1])
    with pytest.raises(DataError, match=r"no column 'label'. Did you mean 'lable'\?"):
        read_columns(file, "text", "label", PETS)


def test_label_out_of_range_names_the_row() -> None:
    with pytest.raises(DataError, match=r"f.csv: row 2, column 'y': class id 2 is outside 0..1 \(2 classes\)"):
        class_ids([1, 2], PETS, where="f.csv", column="y")
    with pytest.raises(DataError, match="class id -1 is outside"):
        class_ids(["-1"], PETS, where="f.csv", column="y")


def test_unknown_class_name() -> None:
    with pytest.raises(DataError, match=r"row 1, column 'y': no class is named 'dgo'. Did you mean 'dog'\?"):
        class_ids(["dgo"], PETS, where="f.csv", column="y")
    with pytest.raises(DataError, match=r"no class is named 0.5"):
        class_ids([0.5], PETS, where="f.csv", column="y")


def test_missing_label() -> None:
    for nothing in (None, ""):
        with pytest.raises(DataError, match="row 2, column 'y': the label is missing"):
            class_ids([0, nothing], PETS, where="f.csv", column="y")


def test_labels_without_classes() -> None:
    with pytest.raises(UsageError, match="name the classes"):
        class_ids([0], [], where="f.csv", column="y")


def test_class_names_that_are_numbers_are_names() -> None:
    assert class_ids(["7", "3"], ["3", "7"], where="f", column="y").tolist() == [1, 0]


def test_empty_split(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"t.csv: the split is empty"):
        read_columns(tmp_path / "t.csv", "text")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_columns(tmp_path / "t.jsonl", "text")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: expected an object, found list"):
        read_columns(tmp_path / "list.jsonl", "text")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_columns(tmp_path / "t.parquet", "text")
    (tmp_path / "t.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_columns(tmp_path / "t.csv", "text")


def test_an_id_needs_a_split() -> None:
    with pytest.raises(DataError, match="as a `datasets` id it needs a split, for example 'ag_news:train'"):
        read_columns("ag_news", "text")


def test_datasets_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"sentence": ["a cat"], "label": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts, labels = read_columns("glue#sst2:train[:1]", "sentence", "label", PETS)
    assert asked == [("glue", "sst2", "train[:1]")]
    assert (texts, labels.tolist()) == (["a cat"], [1])  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no column 'text'"):
        read_columns("glue#sst2:train", "text")


def test_datasets_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"ag_news:train: could not be loaded by `datasets` \(no network\)"):
        read_columns("ag_news:train", "text")


def test_text_batches_are_trimmed_to_their_longest(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write_parquet(tmp_path / "t.parquet", text=["a", "a small cat", "dog barks"], label=[0, 0, 1])
    examples = read_examples(file, tokenizer_folder, kind="sequence-classifier", label="label", classes=PETS)
    assert isinstance(examples, TextExamples)
    assert len(examples) == 3
    inputs, labels = examples.batch(torch.tensor([2, 0]))
    assert inputs["input_ids"].tolist() == [[5, 6], [2, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert examples.lengths.tolist() == [1, 3, 2]


def test_texts_are_cut(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write_parquet(tmp_path / "t.parquet", text=["a small cat"])
    examples = read_examples(file, tokenizer_folder, kind="sentence-encoder", max_tokens=2)
    inputs, labels = examples.batch(torch.tensor([0]))
    assert inputs["input_ids"].tolist() == [[2, 3]]
    assert labels is None


def test_a_text_that_is_none(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write_parquet(tmp_path / "t.parquet", text=["a", None])
    with pytest.raises(DataError, match="row 2, column 'text': expected a text, found nothing"):
        read_examples(file, tokenizer_folder, kind="sequence-classifier")


def test_fingerprint_tells_splits_apart(tokenizer_folder: Path) -> None:
    from calmerge.tasks.data import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    labels = torch.tensor([0, 1])
    one = TextExamples(["a", "cat"], labels, tokenizer)
    assert one.fingerprint == TextExamples(["a", "cat"], labels.clone(), tokenizer).fingerprint
    assert one.fingerprint != TextExamples(["a", "cat"], labels.flip(0), tokenizer).fingerprint
    assert one.fingerprint != TextExamples(["a", "dog"], labels, tokenizer).fingerprint


def test_image_folder(tmp_path: Path) -> None:
    for name, value in (("dog/1.png", 255), ("cat/1.png", 0), ("cat/2.png", 51)):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(value))
    files, labels = read_columns(tmp_path / "images", "image", "label")
    assert [f.name for f in files] == ["1.png", "2.png", "1.png"]
    assert labels.tolist() == [0, 0, 1]  # type: ignore[union-attr]
    pixels, _ = ImageExamples(files, labels, PLAIN).batch(torch.tensor([1, 2]))
    assert torch.allclose(pixels["pixel_values"], torch.tensor([0.2, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2))


def test_image_folder_with_wanted_class_missing(tmp_path: Path) -> None:
    (tmp_path / "images" / "bird").mkdir(parents=True)
    (tmp_path / "images" / "bird" / "1.png").write_bytes(png(0))
    with pytest.raises(DataError, match="no class is named 'bird'"):
        read_columns(tmp_path / "images", "image", "label", PETS)


def test_loose_images_are_a_pool_only(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(0))
    assert read_columns(tmp_path, "image") == ([tmp_path / "1.png"], None)
    with pytest.raises(DataError, match="lies in no class's sub-folder"):
        read_columns(tmp_path, "image", "label", PETS)


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images found"):
        read_columns(tmp_path, "image")


def test_parquet_images_as_bytes_and_as_struct(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "preprocessor_config.json").write_text(json.dumps({"do_resize": False, "do_normalize": False}))
    (model / "config.json").write_text(json.dumps({"num_channels": 1}))
    structs = [{"bytes": png(255), "path": None}, {"bytes": png(0), "path": "x.png"}]
    file = write_parquet(tmp_path / "t.parquet", image=structs, raw=[png(255), png(0)], label=["dog", "cat"])
    for column in ("image", "raw"):
        examples = read_examples(file, model, kind="image-classifier", input=column, label="label", classes=PETS)
        inputs, labels = examples.batch(torch.tensor([0, 1]))
        assert inputs["pixel_values"].amax((1, 2, 3)).tolist() == [1, 0]
        assert labels.tolist() == [1, 0]  # type: ignore[union-attr]
        again, _ = examples.batch(torch.tensor([0]))
        assert torch.equal(again["pixel_values"][0], inputs["pixel_values"][0])


def test_unreadable_image_names_its_row() -> None:
    with pytest.raises(DataError, match=r"t.parquet, row 2: the image cannot be read"):
        ImageExamples([png(0), b"no image"], None, PLAIN, where="t.parquet").batch(torch.tensor([1]))
    with pytest.raises(DataError, match=r"row 1: no such image: gone.png"):
        ImageExamples([Path("gone.png")], None, PLAIN).batch(torch.tensor([0]))
    with pytest.raises(DataError, match=r"row 1: the image cannot be read"):
        ImageExamples([None], None, PLAIN).batch(torch.tensor([0]))


def test_no_images_and_no_texts() -> None:
    with pytest.raises(DataError, match="split is empty"):
        ImageExamples([], None, PLAIN)
    with pytest.raises(DataError, match="split is empty"):
        TextExamples([], None, None)


def test_no_preprocessor_config(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no preprocessor_config.json"):
        preprocessing(tmp_path)


def test_image_scaling() -> None:
    settings = {
        "num_channels": 3,
        "size": {"shortest_edge": 4},
        "do_center_crop": True,
        "crop_size": {"height": 4, "width": 2},
        "image_mean": [0.5, 0.0, 0.0],
        "image_std": [0.5, 1.0, 0.5],
    }
    pixels = image_tensor(PIL.Image.new("RGB", (8, 16), (255, 51, 0)), settings)
    assert pixels.shape == (3, 4, 2)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, 0.2, 0.0]))
    pixels = image_tensor(PIL.Image.new("L", (3, 3), 255), {"num_channels": 1, "size": {"height": 2, "width": 5}})
    assert pixels.shape == (1, 2, 5)
    assert torch.equal(pixels, torch.ones(1, 2, 5))


def test_from_loader_uses_the_collate_function() -> None:
    dataset = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1]))
    examples = from_loader(DataLoader(dataset, batch_size=1, shuffle=True))
    inputs, labels = examples.batch(torch.tensor([2, 0]))
    assert inputs.tolist() == [[4, 5], [0, 1]]
    assert labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert len(examples) == 3


def test_datasets_of_other_shapes() -> None:
    one = DatasetExamples([{"x": torch.ones(2), "labels": 1}])
    inputs, labels = one.batch(torch.tensor([0]))
    assert list(inputs) == ["x"]
    assert labels.tolist() == [1]  # type: ignore[union-attr]
    assert DatasetExamples([{"x": torch.ones(2)}]).batch(torch.tensor([0]))[1] is None
    assert DatasetExamples([torch.ones(2)]).batch(torch.tensor([0]))[1] is None
    assert DatasetExamples([(torch.ones(2),)]).batch(torch.tensor([0]))[1] is None
    three = DatasetExamples([(1, 2, 3)])
    with pytest.raises(DataError, match="neither"):
        three.batch(torch.tensor([0]))
    with pytest.raises(DataError, match="has no length or index"):
        DatasetExamples(iter([1]))
