"""Whether a folder that calmerge wrote is still as it was written."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from calmerge._errors import CheckpointError
from calmerge._hash import ALGORITHM, hash_of
from calmerge._header import read_header
from calmerge._measure import workers
from calmerge._run import Run
from calmerge._shards import check_index, read_index
from calmerge._writer import INDEX, MANIFEST

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def verify(folder: str | Path, *, run: Run | None = None) -> list[str]:
    """What is wrong with the files of a folder, a sentence each; nothing, if it is as `save` or `export` wrote it.

    Every file of the manifest is there and has its hash; no other file holds weights; headers are sound; and the index
    of shards and the shards agree. Model card and reports may be edited: they are not looked at.

    Args:
        folder: what `save` or `export` wrote.
        run: progress in bytes.

    Raises:
        CheckpointError: it has no manifest that can be read.

    >>> import tempfile; from calmerge import save, task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = save(Path(place) / "merged", tvs, tvs.of("a"))
    ...     before = verify(Path(place) / "merged")
    ...     (Path(place) / "merged" / "model.safetensors").unlink()
    ...     before, verify(Path(place) / "merged")
    ([], ['model.safetensors is missing.'])
    """
    folder = Path(folder)
    files = _files_of_manifest(folder)
    return [
        *_faults_of_files(folder, files, run or Run()),
        *_more_weights(folder, files),
        *_faults_of_index(folder, files),
    ]


def _files_of_manifest(folder: Path) -> dict[str, str]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"'{folder}' is no folder that calmerge wrote: {MANIFEST} is missing.")
    try:
        content = json.loads(manifest.read_text())
        known = {str(name): str(hash) for name, hash in content["files"].items()}
        algorithm = content.get("hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{manifest}: not a readable manifest ({type(e).__name__}: {e}).") from None
    for name in known:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise CheckpointError(f"{manifest}: names '{name}', which lies outside the folder. Refused.")
    if algorithm != ALGORITHM:
        raise CheckpointError(
            f"{manifest}: its hashes are {algorithm or 'of a kind that it does not name'}, and this version compares "
            f"{ALGORITHM}. Use the calmerge that wrote the folder."
        )
    return known


def _faults_of_files(folder: Path, files: Mapping[str, str], run: Run) -> Iterator[str]:
    there = [name for name in files if (folder / name).is_file()]
    sizes = {name: (folder / name).stat().st_size for name in there}
    yield from (f"{name} is missing." for name in files if name not in sizes)
    with run.progress.track("verifying", sum(sizes.values()), "B") as bar, workers(os.cpu_count() or 1) as pool:
        for name, found in zip(there, pool.map(lambda name: hash_of(folder / name), there), strict=True):
            bar.advance(sizes[name])
            if found != files[name]:
                yield _header_fault(folder / name) or (
                    f"{name} has changed since it was written: its BLAKE3 is {found[:12]}..., the manifest's "
                    f"{files[name][:12]}..."
                )


def _header_fault(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    try:
        read_header(file)
    except CheckpointError as e:
        return str(e)
    return None


def _more_weights(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix in _WEIGHTS and name not in files:
            yield f"{name} was not written by this merge, but holds weights that a loader may take; move it away."


def _faults_of_index(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Where shards and index disagree; shards that are missing or cannot be read have been told already."""
    for index in sorted(folder.rglob(INDEX)):
        beside = [index.parent / PurePath(n).name for n in files if (folder / n).parent == index.parent]
        shards = [f for f in beside if f.suffix == ".safetensors" and f.name != "head.safetensors"]
        try:
            weight_map = read_index(index)
            unknown = sorted(set(weight_map.values()) - {f.name for f in shards})
            if unknown:
                yield f"{index}: names '{unknown[0]}', which this merge did not write."
            elif all(f.is_file() and not _header_fault(f) for f in shards):
                held = {f.name: read_header(f).tensors for f in shards}
                check_index(index, weight_map, held)
                said = json.loads(index.read_text()).get("metadata", {}).get("total_size")
                size = sum(entry.stop - entry.start for tensors in held.values() for entry in tensors.values())
                if said != size:
                    yield f"{index}: says that the tensors take {said} bytes, but they take {size}."
        except CheckpointError as e:
            yield str(e)
