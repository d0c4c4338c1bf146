"""The bench of merges runs, on sizes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "merge.py"


def test_the_bench_prints_and_keeps_all_its_figures(tmp_path: Path) -> None:
    small = ["--params", "3e5", "--experts", "2", "--shard", "200KB", "--threads", "1", "--repeats", "1"]
    few = ["--methods", "ties", "nosuch", "--curve", "2", "--curve-params", "2e5", "--curve-methods", "ties"]
    kept = ["--tensors", "20", "--folder", str(tmp_path / "kept"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([sys.executable, str(BENCH), *small, *few, *kept], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nosuch: skipped, no method has this name" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    (row,) = figures["merges"]
    assert row["method"] == "ties"
    assert row["limit"] > 0
    assert row["streamed"]["seconds"] > 0
    assert row["moved"] > 4 * 2 * 3e5 * 0.9
    assert [one["experts"] for one in figures["curve"]] == [2]
    assert [one["tensors"] for one in figures["many tensors"]] == [20, 20, 20]
    assert len(list((tmp_path / "kept" / "model" / "base").glob("model-*.safetensors"))) > 1
