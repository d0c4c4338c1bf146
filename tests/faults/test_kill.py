"""A merge that is killed at any moment leaves no folder that looks finished, and goes on to the right bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from calmerge._random import uniform

KILLS = 100
Merges = Callable[..., dict[str, Any]]
SERVER = Path(__file__).parent / "merges.py"
METHODS = {
    "task_arithmetic": "  - task_arithmetic: {scale: 0.4}\n",  # no pass before the one that writes
    "ties": "  - drop_and_rescale: {rate: 0.5}\n  - ties: {keep: 0.3}\n",  # thresholds are found first
}


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merges]:
    """Runs one merge in a fork of a warm interpreter, `merges(argv, kill=seconds)`."""
    log = tmp_path_factory.mktemp("log") / "log"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def merge(argv: list[str], kill: float | None = None) -> dict[str, Any]:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(json.dumps({"argv": argv, "kill": kill, "log": str(log)}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline()) | {"log": log.read_text() if log.exists() else ""}

        yield merge
        server.stdin.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill does not stop what the system has been handed already."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def recipe(request: pytest.FixtureRequest, place: Path, write_folder: Callable[..., Path]) -> Path:
    """A recipe of a base and three experts in bfloat16, 0.7 million entries each, with heads, in two shards."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (400, 256), "norm.weight": (256,), "gain": ()}
    for layer in range(3):
        shapes |= {f"layers.{layer}.attn.q.weight": (256, 256), f"layers.{layer}.mlp.up.weight": (512, 256)}
    base = {n: uniform(shape, "base", n).bfloat16() for n, shape in shapes.items()} | {"steps": torch.tensor([7])}
    write_folder(place / "in" / "base", base, 2)
    (place / "in" / "base" / "config.json").write_text('{"model_type": "toy"}\n')
    for task in "abc":
        tuned = {n: w + 0.1 * uniform(tuple(w.shape), task, n) if n != "steps" else w for n, w in base.items()}
        expert = {n: w.to(base[n].dtype) for n, w in tuned.items()}
        write_folder(place / "in" / task, {**expert, "head.weight": uniform((4, 256), task)}, 2)
    file = place / "in" / "recipe.yaml"
    file.write_text(
        "base: ./base\nexperts: {a: ./a, b: ./b, c: ./c}\nseed: 3\nout: {shard: 250KB}\nmerge:\n"
        + METHODS[request.param]
    )
    return file


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): blake3(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def weights_of(folder: Path) -> dict[str, str]:
    """The bytes that must come out, without the records of when and how."""
    return {n: d for n, d in digests(folder).items() if not n.startswith(("report.", "calmerge.json", "README"))}


def finished_files(out: Path) -> int:
    journal = out.with_name(f".{out.name}.journal")
    return journal.read_bytes().count(b'"file"') if journal.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(METHODS), indirect=True)
def test_a_hundred_kills_cost_nothing(recipe: Path, merges: Merges, place: Path) -> None:
    inputs = digests(recipe.parent)
    times = {f: f.stat().st_mtime_ns for f in recipe.parent.rglob("*")}
    whole = [merges(["merge", str(recipe), "--out", str(place / f"whole{i}"), "-q"]) for i in range(2)]
    assert [done["code"] for done in whole] == [0, 0], whole[0]["log"]
    expected = weights_of(place / "whole0")
    assert len([name for name in expected if name.startswith("model-")]) >= 5
    assert weights_of(place / "whole1") == expected
    takes = min(done["seconds"] for done in whole)

    rng = random.Random(0)
    seen: Counter[str] = Counter()
    kills = chain = 0
    while kills < KILLS // len(METHODS) or (min(seen["0 files"], seen["1 files"]) < 3 and kills < 5 * KILLS):
        out = place / f"out{chain}"
        for attempt in range(rng.randint(1, 5)):
            argv = ["merge", str(recipe), "--out", str(out), "-q", *(["--resume"] if attempt else [])]
            done = merges(argv, kill=rng.uniform(0, takes))
            assert done["code"] in (0, -9), done["log"]
            kills += done["code"] == -9
            if out.exists():  # it was too late, or the folder had got its name just before
                seen["finished"] += 1
                break
            left = out.with_name(f".{out.name}.partial").exists()
            seen[f"{min(finished_files(out), 1)} files" if left else "nothing begun"] += 1
        done = merges(["merge", str(recipe), "--out", str(out), "-q", "--resume"])
        assert done["code"] == 0, done["log"]
        assert weights_of(out) == expected
        manifest = json.loads((out / "calmerge.json").read_text())
        assert manifest["files"].items() <= digests(out).items()
        hidden = [p.name for p in place.iterdir() if p.name.startswith(".")]
        assert hidden == [], f"a finished merge left {hidden}"
        chain += 1

    assert digests(recipe.parent) == inputs
    assert {f: f.stat().st_mtime_ns for f in recipe.parent.rglob("*")} == times
    assert seen["0 files"] >= 3, seen  # while it measured, or wrote the first file
    assert seen["1 files"] >= 3, seen  # with something to go on from


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
def test_a_killed_merge_is_begun_anew_without_resume(recipe: Path, merges: Merges, place: Path) -> None:
    out = place / "out"
    takes = merges(["merge", str(recipe), "--out", str(place / "whole"), "-q"])["seconds"]
    while not out.with_name(".out.partial").exists():
        merges(["merge", str(recipe), "--out", str(out), "-q"], kill=0.7 * takes)
        if out.exists():  # it was done before: the machine had been slower while the time was taken
            assert weights_of(out) == weights_of(place / "whole")
            shutil.rmtree(out)
            takes *= 0.7
    done = merges(["merge", str(recipe), "--out", str(out), "-q"])
    assert done["code"] == 0, done["log"]
    assert weights_of(out) == weights_of(place / "whole")
    assert [p.name for p in place.iterdir() if p.name.startswith(".")] == []
