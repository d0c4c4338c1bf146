"""The bench of fitting runs, at a size that takes seconds, and prints a row for every part."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_every_part_is_measured_for_every_number_of_experts() -> None:
    sizes = ["--width", "32", "--layers", "1", "--tokens", "4", "--batch", "2", "--updates", "3", "--experts", "2"]
    done = subprocess.run([sys.executable, BENCH / "fit.py", *sizes], capture_output=True, text=True, check=True)
    rows = [
        line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ") and "experts" not in line
    ]
    found = [(int(n), what.strip()) for n, what in rows if n.strip().isdigit()]
    assert found == [(n, part) for n in (2,) for part in ("bare", "adamerging", "calm", "plain")]
    assert "calm above bare" in done.stdout
