"""What fitting costs beside the model itself: time per update and peak memory, by number of experts, against a peer.

    python bench/fit.py                               # the sizes of MiniLM's encoder
    python bench/fit.py --peer peer/bin/python        # with FusionBench, in an environment of its own
    python bench/fit.py --width 192 --layers 4 --updates 6 --experts 2 4

For every number of experts, each in a process of its own, over the same batches (one a task and update):

    bare         forward and backward passes of the model alone
    adamerging   calmerge, layer-wise, experts on disk
    calm         calmerge, one mask stage against the loss of all tasks, experts on disk
    plain        AdaMerging's algorithm written the plain way: all experts in memory, autograd through the merge
    fusion_bench FusionBench's LayerWiseMergedModel (needs --peer), the same algorithm

Time is the median update. Memory is the highest private memory of the process less what it had after its imports, in
units of P floats; every task brings inputs of its own, so `bare` grows with them too, and what a method adds is what
lies above it. To reach, at 8 experts: adamerging and calm at most 1.25 x bare; what is added flat in the number of
experts within 5 %; at 16 experts below a third of the peer's; calm at most 6 P floats above the model's activations.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from calmerge import Run, TaskVectors, adamerging, calm, save, task_vectors
from calmerge._memory import peak_memory, private_memory
from calmerge._random import uniform
from calmerge._weights import StateDict
from calmerge.fitting.objectives import entropy
from calmerge.tasks.base import Batch, Batches, Task, Tasks
from calmerge.tasks.module import ModuleModel

sys.path.insert(0, str(Path(__file__).parent))
from fit_peer import CLASSES, Encoder, inputs_of, run_plain

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system, so that the peak is what is held
PARTS = ("bare", "adamerging", "calm", "plain", "fusion_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="python of an environment with torch and fusion-bench")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        p = write_checkpoints(args)
        print(f"model: {p / 1e6:.2f} M merged entries ({4 * p / 1e6:.0f} MB in float32), {args.threads} thread(s);")
        print(f"an update is one batch of {args.batch} x {args.tokens} tokens of every task\n")
        report(args, p)


def report(args: argparse.Namespace, p: int) -> None:
    parts = [part for part in PARTS if part != "fusion_bench" or args.peer]
    print("| experts | what | s per update | x bare | peak, MB | in P floats |")
    print("| --: | :-- | --: | --: | --: | --: |")
    found = {}
    for experts in args.experts:
        for part in parts:
            one = found[experts, part] = child(args, part, experts)
            ratio = one["seconds"] / found[experts, "bare"]["seconds"]
            print(
                f"| {experts} | {part} | {one['seconds']:.3f} | {ratio:.2f} | {one['peak'] / 1e6:.0f} "
                f"| {one['peak'] / (4 * p):.2f} |",
                flush=True,
            )
    few, many = min(args.experts), max(args.experts)
    for part in ("adamerging", "calm"):
        above = {n: found[n, part]["peak"] - found[n, "bare"]["peak"] for n in (few, many)}
        ratio = above[many] / above[few]
        print(f"\n{part}: peak above bare with {many} experts / with {few}: {ratio:.3f} (within 5 % of 1)")
        for peer in parts[3:]:
            share = found[many, part]["peak"] / found[many, peer]["peak"]
            print(f"{part}: whole peak with {many} experts / {peer}'s: {share:.2f} (below 0.33)")
    more = (found[many, "calm"]["peak"] - found[many, "bare"]["peak"]) / (4 * p)
    print(f"\ncalm above bare: {more:.2f} P floats; theta and its gradient are in both: {more + 2:.2f} of 6 in all")


def write_checkpoints(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    base = Encoder(args.width, args.layers).state_dict()
    tvs = task_vectors(base, {"base": base})
    save(args.folder / "base", tvs, tvs.of("base"))
    for t in range(max(args.experts)):
        noise = {n: 0.02 * (uniform(tuple(w.shape), t, n) - 0.5) for n, w in base.items()}
        save(args.folder / f"t{t}", tvs, StateDict(noise))
    return tvs.numel


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One part with one number of experts, in this process."""
    start = private_memory() or 0
    with peak_memory() as peak:
        seconds = {"bare": bare, "adamerging": ours(adamerging), "calm": ours(calm), "plain": plain}[args.part](args)
    return {"seconds": statistics.median(seconds), "peak": (peak.bytes or 0) - start}


def bare(args: argparse.Namespace) -> list[float]:
    encoder, tasks = problem(args)
    weights = {n: p.detach().clone().requires_grad_() for n, p in encoder.named_parameters()}
    gradient = tasks.gradient(entropy, batches(args))
    seconds = []
    for step in range(args.updates):
        started = time.perf_counter()
        gradient(weights, step)
        seconds.append(time.perf_counter() - started)
        for w in weights.values():
            w.grad = None
    return seconds


def ours(method: Callable[..., object]) -> Callable[[argparse.Namespace], list[float]]:
    def measured(args: argparse.Namespace) -> list[float]:
        _, tasks = problem(args)
        watch = Watch()
        options = {"steps": args.updates, "tasks": tasks, "run": Run(progress=watch)}
        if method is adamerging:
            adamerging(vectors(args), order=batches(args), **options)
        else:
            calm(vectors(args), sequential=1, sampling="all", order=lambda stage: batches(args), **options)
        return watch.intervals()

    return measured


def plain(args: argparse.Namespace) -> list[float]:
    return run_plain(args.folder, args.experts[0], args.width, args.layers, args.tokens, args.batch, args.updates)


def problem(args: argparse.Namespace) -> tuple[Encoder, Tasks]:
    torch.manual_seed(0)
    encoder = Encoder(args.width, args.layers)
    names = [f"t{t}" for t in range(args.experts[0])]
    heads = {name: nn.Linear(args.width, CLASSES) for name in names}
    data = {
        name: torch.utils.data.TensorDataset(inputs_of(t, 2 * args.batch, args.tokens, args.width))
        for t, name in enumerate(names)
    }
    pools = {name: Task(torch.utils.data.DataLoader(dataset)) for name, dataset in data.items()}
    return encoder, Tasks(ModuleModel(encoder, heads), pools)


def vectors(args: argparse.Namespace) -> TaskVectors:
    return task_vectors(args.folder / "base", {f"t{t}": args.folder / f"t{t}" for t in range(args.experts[0])})


def batches(args: argparse.Namespace) -> Batches:
    """One batch of every task, with targets for objectives that want them."""

    def of(step: int) -> Iterator[Batch]:
        for t in range(args.experts[0]):
            indices = torch.arange(args.batch)
            yield Batch(f"t{t}", indices, indices % CLASSES)

    return of


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
        if self._on and n:
            self.times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def child(args: argparse.Namespace, part: str, experts: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    sizes = [args.width, args.layers, args.tokens, args.batch, args.updates, args.threads]
    if part == "fusion_bench":
        command = [str(args.peer), str(Path(__file__).with_name("fit_peer.py")), str(args.folder), str(experts)]
        command += [str(size) for size in sizes]
    else:
        command = [sys.executable, __file__, "--part", part, "--folder", str(args.folder), "--experts", str(experts)]
        for name, size in zip(("width", "layers", "tokens", "batch", "updates", "threads"), sizes, strict=True):
            command += [f"--{name}", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | GIVE_BACK)
    if done.returncode:
        raise SystemExit(f"{part} with {experts} experts failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
