"""What ranks and sums cost with the compiled loops and with the NumPy lines that they stand beside, in the same run.

    python bench/kernels.py                   # some seconds; docs/performance.md has the figures

One thread, the better of five runs, nanoseconds an entry. `bf16` are differences of numbers in bfloat16, of which many
are equal, `float32` are not.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch

import calmerge._machine  # noqa: F401  (so that there are loops)
from calmerge import _dot, _rank
from calmerge._watch import Array
from calmerge.pieces import magprune


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    base, step = (torch.randn(1024, 2816, generator=draw) for _ in range(2))
    stored = (0.02 * base).bfloat16()
    fine = 0.001 * step
    coarse = (stored.float() + fine).bfloat16().float() - stored.float()
    sparse = fine * (base > 0.5)
    for kind, matrix in (("bf16", coarse), ("float32", fine)):
        told("order of rows of 2,816", kind, matrix, lambda x=matrix: magprune._ordered(x))
    for kind, matrix in (("bf16", coarse), ("float32", fine), ("two thirds 0", sparse)):
        row: Array = matrix.abs().reshape(-1).numpy()
        told("median of 2.9 M magnitudes", kind, matrix, lambda x=row: _rank.nth(x, len(x) // 2))
    for tasks in (3, 8):
        rows = fine.reshape(-1)[: 2**18 * tasks].reshape(tasks, -1)
        array: Array = rows.numpy()
        told(f"sums of {tasks} vectors", "float32", rows, lambda x=array: _dot.row_sums(x))
        told(f"inner products of {tasks} vectors", "float32", rows, lambda x=array: _dot.row_products(x))


def told(what: str, kind: str, matrix: torch.Tensor, run: Callable[[], object]) -> None:
    ours = fastest(run)
    with ExitStack() as without:
        for module in (_rank, magprune, _dot):
            without.enter_context(patch.object(module, "kernels", lambda: None))
        theirs = fastest(run)
    ours, theirs = (1e9 * seconds / matrix.numel() for seconds in (ours, theirs))
    print(f"{what:28s} {kind:13s} compiled {ours:6.2f}   NumPy {theirs:7.2f}   {theirs / ours:6.1f} x", flush=True)


def fastest(run: Callable[[], object], runs: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
