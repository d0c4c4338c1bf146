"""What CALM costs beside the model itself: time per update, and peak memory by number of experts.

    python bench/calm.py                      # the sizes of MiniLM's encoder, a few minutes
    python bench/calm.py --width 192 --layers 4 --updates 20

Time: the median update of one mask optimisation, against one bare forward and backward pass of the same model over the
same batches, in one process, in turn. To reach: at most 1.25 x.
Memory: the highest private memory of a process that merges T experts lying on disk, less what it had after its imports,
less the same of a process that only runs the bare passes (a model, its gradient, its activations), in units of P
floats. To reach: theta and G are in both, so at most 6 - 2 = 4, and the same for 3 and 8 experts within 5 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from calmerge import Run, TaskVectors, calm, save, task_vectors
from calmerge._memory import peak_memory, private_memory
from calmerge._random import uniform
from calmerge._weights import StateDict
from calmerge.fitting.objectives import pseudo_label
from calmerge.fitting.samplers import shuffled
from calmerge.tasks.base import Batches, Task, Tasks
from calmerge.tasks.module import ModuleModel

CLASSES = 8
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system, so that the peak is what is held


class Encoder(nn.Module):
    """A transformer over random token embeddings: [n, tokens, width] to the mean of its states."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).mean(1)
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=["time", "bare", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps({"time": measure_time, "bare": measure_bare, "memory": measure_calm}[args.part](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        write_checkpoints(args)
        report(args)


def report(args: argparse.Namespace) -> None:
    timing = child(args, "time", max(args.experts))
    p = timing["entries"]
    print(f"model: {p / 1e6:.2f} M merged entries, {args.layers} layers of width {args.width}; {args.threads} threads")
    print(f"update over {timing['batches']} batches of {args.batch} x {args.tokens} tokens:")
    print(f"  bare forward + backward   {timing['bare']:.3f} s")
    print(f"  CALM update               {timing['calm']:.3f} s")
    print(f"  ratio                     {timing['calm'] / timing['bare']:.2f}   (at most 1.25)")
    bare = child(args, "bare", max(args.experts))["peak"]
    peaks = {t: child(args, "memory", t)["peak"] for t in args.experts}
    print(f"peak private memory above the imports (P floats = {4 * p / 1e6:.1f} MB):")
    print(f"  bare forward + backward   {bare / 1e6:7.1f} MB")
    for t, peak in peaks.items():
        more = (peak - bare) / (4 * p)
        print(f"  CALM, {t:2d} experts          {peak / 1e6:7.1f} MB   bare + {more:.2f} P floats   (at most 4)")
    few, many = min(peaks), max(peaks)
    print(f"  {many} experts over {few}         {peaks[many] / peaks[few]:.3f}   (within 5 % of 1)")


def write_checkpoints(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    base = Encoder(args.width, args.layers).state_dict()
    tvs = task_vectors(base, {"base": base})
    save(args.folder / "base", tvs, tvs.of("base"))
    for t in range(max(args.experts)):
        noise = {n: 0.02 * (uniform(tuple(w.shape), t, n) - 0.5) for n, w in base.items()}
        save(args.folder / f"expert{t}", tvs, StateDict(noise))


def problem(args: argparse.Namespace, experts: int) -> tuple[Encoder, Tasks]:
    torch.manual_seed(0)
    encoder = Encoder(args.width, args.layers)
    heads = {f"t{t}": nn.Linear(args.width, CLASSES) for t in range(experts)}
    pools = {
        name: Task(
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, args.tokens, args.width)))
        )
        for name in heads
    }
    return encoder, Tasks(ModuleModel(encoder, heads), pools)


def vectors(args: argparse.Namespace, experts: int) -> TaskVectors:
    return task_vectors(args.folder / "base", {f"t{t}": args.folder / f"expert{t}" for t in range(experts)})


def measure_time(args: argparse.Namespace) -> dict[str, float]:
    experts = args.experts[0]
    encoder, tasks = problem(args, experts)
    tvs = vectors(args, experts)
    draw = batches(tasks, args)
    bare = bare_updates(encoder, tasks, draw, args.updates // 2)
    watch = Watch()
    calm(
        tvs, tasks=tasks, sequential=1, steps=args.updates, batch=args.batch, batches=2, sampling="all",
        order=lambda stage: draw, run=Run(progress=watch),
    )  # fmt: skip
    bare += bare_updates(encoder, tasks, draw, args.updates // 2)
    return {
        "bare": statistics.median(bare),
        "calm": statistics.median(watch.intervals()),
        "batches": sum(1 for _ in draw(0)),
        "entries": tvs.numel,
    }


def measure_bare(args: argparse.Namespace) -> dict[str, float]:
    start = private_memory() or 0
    encoder, tasks = problem(args, args.experts[0])
    with peak_memory() as peak:
        bare_updates(encoder, tasks, batches(tasks, args), 3)
    return {"peak": (peak.bytes or 0) - start}


def measure_calm(args: argparse.Namespace) -> dict[str, float]:
    start = private_memory() or 0
    _, tasks = problem(args, args.experts[0])
    with peak_memory() as peak:
        calm(
            vectors(args, args.experts[0]), tasks=tasks, sequential=1, steps=3, batch=args.batch, batches=2,
            sampling="all", order=lambda stage: batches(tasks, args),
        )  # fmt: skip
    return {"peak": (peak.bytes or 0) - start}


def batches(tasks: Tasks, args: argparse.Namespace) -> Batches:
    pools = {name: torch.arange(64) for name in list(tasks)[:3]}
    plain = shuffled(pools, size=args.batch, count=2)
    return lambda step: (b._replace(targets=b.indices % CLASSES) for b in plain(step))


def bare_updates(encoder: Encoder, tasks: Tasks, draw: Batches, updates: int) -> list[float]:
    """Seconds of each update: the sum of the losses' gradients with respect to the module's own parameters."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in encoder.named_parameters()}
    gradient = tasks.gradient(pseudo_label, draw)
    seconds = []
    for step in range(updates):
        started = time.perf_counter()
        gradient(weights, step)
        seconds.append(time.perf_counter() - started)
        for w in weights.values():
            w.grad = None
    return seconds


class Watch:
    """A `Progress` that notes when the updates of a fit end."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._on = False

    @contextmanager
    def track(self, label: str, total: float, unit: str = "it") -> Iterator["Watch"]:
        self._on = unit == "update"
        yield self

    def advance(self, n: float = 1, **info: object) -> None:
        if self._on:
            self.times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def child(args: argparse.Namespace, part: str, experts: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(args.folder), "--experts", str(experts)]
    for name in ("width", "layers", "tokens", "batch", "updates", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK)
    result: dict[str, float] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
