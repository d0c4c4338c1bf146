"""How fast a merge is, and how much memory it takes: beside plain copies of the same bytes, and beside mergekit.

    python bench/merge.py                                                   # calmerge alone, a few minutes
    python bench/merge.py --mergekit /path/to/mergekit-yaml                 # in turn with mergekit
    python bench/merge.py --methods ties della config.yml --params 7e9      # some methods; a mergekit configuration
    python bench/merge.py --params 2e6 --experts 2 --tensors 50 --curve 2 4 # seconds

It makes a Llama-shaped base of random bfloat16 numbers, in shards, and experts that differ from it as fine-tunes do. In
a mergekit configuration `{base}`, `{expert1}`, `{expert2}` ... stand for them. Every merge runs in a process of its
own, twice, and the better run counts. `limit` is the time of reading all its inputs and writing its output with plain
copies, by as many threads, in the same run; files are in the page cache, and so is room for the output. `streamed` is
a merge without what plain copies do not do (hashes, flushing to disk), and its share of the limit is printed, by the
clock and by processor time, which a busy machine disturbs less; `whole` is all that `save` does, and is compared with
mergekit. Start-up (imports) is printed once for each tool and is in no other figure; that of numba belongs to it.
`private` is the highest private memory (`RssAnon`) of the process above what its imports take; files that are mapped do
not count.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
PIECE = 1 << 20  # bytes of one plain copy
NUMBA = """import numpy, calmerge._machine, calmerge._kernels
calmerge._kernels.spread(0, 1, 0, numpy.empty(1, numpy.uint8))"""  # numba imports most of itself at a first call
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32000}


class Case(NamedTuple):
    """One merge: calmerge's method with its options, and the same thing in mergekit's words, if it has it."""

    method: str
    options: Mapping[str, Any] = {}
    mergekit: str | None = None
    parameters: Mapping[str, Any] = {}
    per_model: Mapping[str, Any] = {}
    experts: int | None = None  # that it takes; all when None
    based: bool = True  # whether mergekit's configuration names the base


CASES = {
    "average": Case("average", {}, "linear", {}, {"weight": 1.0}, based=False),
    "task_arithmetic": Case("task_arithmetic", {"scale": 0.3}, "task_arithmetic", {}, {"weight": 0.3}),
    "ties": Case("ties", {"keep": 0.2}, "ties", {}, {"weight": 1.0, "density": 0.2}),
    "dare": Case("dare", {"rate": 0.9}, "dare_linear", {}, {"weight": 0.3, "density": 0.1}),
    "dare_ties": Case("dare_ties", {"rate": 0.9}, "dare_ties", {}, {"weight": 1.0, "density": 0.1}),
    "breadcrumbs": Case("breadcrumbs", {}, "breadcrumbs", {}, {"weight": 0.3, "density": 0.9, "gamma": 0.01}),
    "sce": Case("sce", {"select_topk": 0.5}, "sce", {"select_topk": 0.5}),
    "della": Case("della", {"rate": 0.5}, "della", {}, {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
    "slerp": Case("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, experts=2),
    "model_stock": Case("model_stock", {}, "model_stock"),
    "karcher": Case("karcher", {}, "karcher", based=False),
    "mergekit_ties": Case("mergekit_ties", {"weight": [1.0], "density": [0.2]}),
    "mergekit_breadcrumbs": Case("mergekit_breadcrumbs", {"weight": [0.3], "density": [0.9]}),
}
DEFAULT = ["average", "task_arithmetic", "ties", "dare", "breadcrumbs", "sce", "della", "slerp", "model_stock"]


class Failed(Exception):
    """What a run of calmerge said last."""


class Figures(NamedTuple):
    """What one process took: seconds of the merge and of its start-up, processor seconds, bytes of memory."""

    seconds: float
    cpu: float
    private: int
    rss: int
    start: float = 0.0
    phases: Mapping[str, float] = {}


def main() -> None:
    """Make the checkpoints, run everything, print."""
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_worker(json.loads(arguments.worker))))
        return
    results: dict[str, Any] = {"machine": _machine(arguments.threads), "arguments": _shown(arguments)}
    with _place(arguments.folder) as place:
        _say("making checkpoints ...")
        model = Models.make(place / "model", arguments.params, arguments.experts, arguments.shard)
        _say(f"{model.entries / 1e9:.3f} G entries, {arguments.experts} experts, {model.nbytes / 1e9:.2f} GB a model")
        results["start"] = _starts(arguments)
        results["merges"] = [row for name in arguments.methods for row in _compare(name, model, arguments)]
        if arguments.curve:
            results["curve"] = _curve(place, arguments)
        if arguments.tensors:
            results["many tensors"] = _many(place, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=DEFAULT, help="names of methods, or mergekit YAML files")
    parser.add_argument("--params", type=float, default=0.35e9, help="entries of a model")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--shard", default="250MB")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each merge of calmerge; the best counts")
    parser.add_argument("--curve", nargs="*", type=int, default=[2, 4, 8, 16, 32], help="numbers of experts; none: off")
    parser.add_argument("--curve-params", type=float, default=12e6)
    parser.add_argument("--curve-methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--tensors", type=int, default=4000, help="of the model of many tiny tensors; 0: off")
    parser.add_argument("--mergekit", help="the command mergekit-yaml of another environment")
    parser.add_argument("--mergekit-limit", type=float, default=600, help="seconds after which mergekit is stopped")
    parser.add_argument("--without-tapes", action="store_true", help="calmerge as it is without numba, to compare")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept and found again; else a temporary one")
    parser.add_argument("--json", type=Path, help="all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# Checkpoints ---------------------------------------------------------------------------------------------------


class Models(NamedTuple):
    """A base and its experts on disk."""

    base: Path
    experts: tuple[Path, ...]

    @classmethod
    def make(cls, place: Path, params: float, experts: int, shard: str) -> "Models":
        """Llama-shaped models of about `params` entries; what is there from an earlier run is used again."""
        return cls._made(place, _llama(params), experts, shard)

    @classmethod
    def tiny(cls, place: Path, tensors: int, experts: int) -> "Models":
        """Models of many tiny tensors, in one file each."""
        return cls._made(place, {f"model.layers.{i}.scale": (16, 16) for i in range(tensors)}, experts, "5GB")

    @classmethod
    def _made(cls, place: Path, shapes: Mapping[str, tuple[int, ...]], experts: int, shard: str) -> "Models":
        names = ["base", *(f"expert{i}" for i in range(1, experts + 1))]
        key = hashlib.sha256(repr((shapes, shard)).encode()).hexdigest()
        for number, name in enumerate(names):
            folder, done = place / name, place / f"{name}.made"
            if not (done.is_file() and done.read_text() == key):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                _write(folder, shapes, number, shard)
                done.write_text(key)
        return cls(place / "base", tuple(place / name for name in names[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes of one model's files."""
        return sum(f.stat().st_size for f in self.base.glob("*.safetensors"))

    @property
    def entries(self) -> int:
        """Of one model."""
        return self.nbytes // 2

    def inputs(self, case: Case) -> list[Path]:
        """The folders that a merge reads."""
        return [self.base, *self.experts[: case.experts]]


def _llama(params: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of about as many entries: width and depth as in the published family."""
    width = 64 * max(1, round((3 * params) ** (1 / 3) / 64))
    inner, vocabulary = 11 * width // 4, 32000 if params > 1e8 else 500
    block = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
    block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    each = sum(a * b for a, b in block.values())
    layers = max(1, round((params - 2 * vocabulary * width) / each))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def _write(folder: Path, shapes: Mapping[str, tuple[int, ...]], number: int, shard: str) -> None:
    """The base (number 0): normal numbers of the size of trained weights. Experts: a twentieth of that added to it,
    tensor by tensor of another size, all rounded to bfloat16, so that many differences are 0 or equal."""
    import torch

    from calmerge._weights import ALL, Memo, Spec, Weights
    from calmerge._writer import write_weights

    def normal(name: str, stream: int) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{name}/{stream}".encode()).digest()[:7], "little")
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed))

    class Random(Weights):
        specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}  # noqa: RUF012
        elementwise = False

        def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> torch.Tensor:
            base = (normal(name, 0) * 0.02).bfloat16()
            if number:
                size = 0.0005 + 0.001 * (sum(name.encode()) % 7) / 7
                base = (base.float() + size * normal(name, number)).bfloat16()
            return base

    write_weights(folder, Random(), shard=shard)
    width = shapes.get("model.norm.weight", (16,))[0]
    layers = len([name for name in shapes if name.endswith("q_proj.weight")])
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 64)}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes | heads))


# Runs ----------------------------------------------------------------------------------------------------------


def _compare(name: str, model: Models, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One merge with both tools, beside the limit."""
    case = CASES.get(name, Case(name))
    dialect = name.endswith((".yml", ".yaml"))
    if dialect and not (importlib.util.find_spec("calmerge.mergekit") and Path(name).is_file()):
        return _say(f"{name}: skipped, no such file or no mergekit dialect here")
    if not dialect and (missing := _missing(case)):
        return _say(f"{name}: skipped, {missing}")
    with tempfile.TemporaryDirectory(dir=model.base.parent) as out:
        place = Path(out)
        inputs, text = model.inputs(case), case.mergekit and _yaml(case, model)
        job: dict[str, Any] = {"method": case.method, "options": dict(case.options)}
        if dialect:
            text = Path(name).read_text()
            for folder in (model.base, *model.experts):
                text = text.replace("{" + folder.name + "}", str(folder))
            named = re.findall(r"model: *[\"']?([^\"'\s,}]+)", text)
            inputs = [p for p in map(Path, dict.fromkeys(named)) if p.is_dir()]
            (place / "config.yml").write_text(text)
            job = {"config": str(place / "config.yml")}
        limit, moved = _limit(inputs, place, arguments.threads)
        job |= {"inputs": [str(p) for p in inputs], "threads": arguments.threads, "out": str(place)}
        job["tapes"] = not arguments.without_tapes
        try:
            streamed, whole = (_calmerge(job | {"streamed": only}, arguments.repeats) for only in (True, False))
        except Failed as e:
            return _say(f"{name}: failed, {e}")
        row = {"method": name, "moved": moved, "limit": limit.seconds, "limit cpu": limit.cpu}
        row |= {"streamed": streamed._asdict(), "whole": whole._asdict(), "share": limit.seconds / streamed.seconds}
        row |= {"share cpu": limit.cpu / streamed.cpu}
        line = (
            f"{name:20} limit {limit.seconds:6.2f} s   streamed {streamed.seconds:6.2f} s = {row['share']:4.0%} of it"
            f" ({row['share cpu']:.0%} by processor)   whole {whole.seconds:6.2f} s"
            f"   private {max(streamed.private, whole.private) / 1e6:5.0f} MB   rss {whole.rss / 1e6:5.0f} MB"
            f"   moved {moved / 1e9:.2f} GB"
        )
        if arguments.mergekit and text:
            theirs = _mergekit(text, inputs, place, arguments)
            if theirs is None:
                line += "   mergekit failed or took too long"
            else:
                row |= {"mergekit": theirs._asdict(), "ratio": theirs.seconds / whole.seconds}
                line += (
                    f"   mergekit {theirs.seconds:6.1f} s = {row['ratio']:.1f} x"
                    f", private {theirs.private / 1e6:.0f} MB, rss {theirs.rss / 1e6:.0f} MB"
                )
        _say(line)
        yield row


def _missing(case: Case) -> str | None:
    """Why calmerge cannot run it, if it cannot."""
    from calmerge._signature import options_of
    from calmerge.methods import METHODS

    if case.method not in METHODS:
        return "no method has this name"
    options = options_of(METHODS[case.method])
    if needed := [o.name for o in options.values() if o.required and o.name not in case.options]:
        return f"it needs {', '.join(needed)}, for which this bench has no value"
    unknown = set(case.options) - set(options)
    return f"it has no option {', '.join(sorted(unknown))}" if unknown else None


def _limit(inputs: Sequence[Path], out: Path, threads: int, runs: int = 3) -> tuple[Figures, int]:
    """Reading all files of `inputs` and writing as many bytes as the first has, with plain copies."""
    reads = [(f, at) for p in inputs for f in sorted(p.glob("*.safetensors")) for at in range(0, _size(f), PIECE)]
    size = sum(_size(f) for f in inputs[0].glob("*.safetensors"))

    def read(piece: tuple[Path, int]) -> None:
        handle = os.open(piece[0], os.O_RDONLY)
        os.preadv(handle, [buffer[: min(PIECE, _size(piece[0]) - piece[1])]], piece[1])
        os.close(handle)

    buffer = memoryview(bytearray(PIECE))
    best: Figures | None = None
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs):  # the first also brings the files into the page cache
            before, started = _cpu(), time.perf_counter()
            for _ in pool.map(read, reads):
                pass
            with (out / "copy").open("wb") as f:
                for _ in pool.map(lambda at: os.pwrite(f.fileno(), buffer, at), range(0, size, PIECE)):
                    pass
            found = Figures(time.perf_counter() - started, _cpu() - before, 0, 0)
            best = found if best is None or found.seconds < best.seconds else best
            (out / "copy").unlink()
    assert best is not None
    return best, sum(_size(f) for p in inputs for f in p.glob("*.safetensors")) + size


def _calmerge(job: Mapping[str, Any], repeats: int) -> Figures:
    """The better of some runs, each in a new process."""
    found = []
    for _ in range(repeats):
        command = [sys.executable, str(HERE), "--worker", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Failed(done.stderr.strip().splitlines()[-1])
        found.append(Figures(**json.loads(done.stdout)))
    return min(found, key=lambda figures: figures.seconds)


def _worker(job: Mapping[str, Any]) -> dict[str, Any]:
    """One merge, in this process."""
    started = time.perf_counter()
    from calmerge._hash import Growing

    phases: dict[str, float] = {}

    @contextmanager
    def timed(label: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        phases[label] = phases.get(label, 0.0) + time.perf_counter() - began

    hashed = Growing.upto

    def upto(self: Growing, end: int | None) -> None:
        with timed("hashing, of all threads"):
            if not job["streamed"]:
                hashed(self, end)

    Growing.upto = upto  # type: ignore[method-assign]
    if job["streamed"]:
        os.fsync = lambda handle: None
    import calmerge
    from calmerge import _compiled
    from calmerge._memory import peak_memory, private_memory
    from calmerge._run import Run
    from calmerge._writer import write_weights
    from calmerge.methods import METHODS

    if not job.get("tapes", True):
        _compiled.LARGE = sys.maxsize

    class Clock:
        """Adds up what each label took."""

        @contextmanager
        def track(self, label: str, total: float, unit: str = "it") -> Iterator["Clock"]:
            with timed(label):
                yield self

        def advance(self, n: float = 1, **info: object) -> None:
            pass

    threads, run = job["threads"], Run(progress=Clock())
    if "config" in job:
        from calmerge._recipe_run import run_recipe
        from calmerge.recipe import load_recipe

        recipe = load_recipe(Path(job["config"]))

        def merge(out: Path) -> object:
            return run_recipe(recipe, out=out, run=run)
    else:
        base, *experts = job["inputs"]
        tvs = calmerge.task_vectors(base, {Path(e).name: e for e in experts})
        if _compiled.usable(tvs.numel, len(tvs.tasks)):
            exec(NUMBA)  # which belongs to the start-up

        def merge(out: Path) -> object:
            delta = METHODS[job["method"]](tvs, **job["options"])
            if isinstance(delta, calmerge.TaskVectors):
                delta = delta.of(delta.tasks[0])
            if not job["streamed"]:
                return calmerge.save(out, tvs, delta, threads=threads, run=run)
            out.mkdir()
            shared = delta.shared if isinstance(delta, calmerge.Merged) else delta
            return write_weights(out, calmerge.add(tvs.base, shared), threads=threads, run=run)

    start = time.perf_counter() - started
    _warm([Path(p) for p in job["inputs"]], Path(job["out"]))
    imported, cpu = private_memory() or 0, _cpu()
    began = time.perf_counter()
    out = Path(job["out"]) / "merged"
    with peak_memory() as peak:
        merge(out)
    seconds, cpu = time.perf_counter() - began, _cpu() - cpu
    shutil.rmtree(out)
    rss = _status(Path("/proc/self/status"), "VmHWM")  # what getrusage says, a child inherits
    return Figures(seconds, cpu, (peak.bytes or 0) - imported, rss, start, phases)._asdict()


def _yaml(case: Case, model: Models) -> str:
    """mergekit's configuration; JSON is YAML."""
    models: list[dict[str, Any]] = [
        {"model": str(p), **({"parameters": dict(case.per_model)} if case.per_model else {})}
        for p in model.experts[: case.experts]
    ]
    config: dict[str, Any] = {"merge_method": case.mergekit, "models": models, "dtype": "bfloat16"}
    if case.mergekit == "slerp":  # between the first model, which is the base there, and the second
        config["base_model"] = str(model.experts[0])
    elif case.based:
        config["base_model"] = str(model.base)
    return json.dumps(config | ({"parameters": dict(case.parameters)} if case.parameters else {}))


def _warm(inputs: Sequence[Path], place: Path) -> None:
    """Bring memory into the state in which `limit` finds it: inputs in the page cache, and room for the output there.

    Where memory that was freed goes back to a host, as in virtual machines, a first write costs several times a second.
    """
    _limit(inputs, place, 1, runs=1)


def _mergekit(text: str, inputs: Sequence[Path], place: Path, arguments: argparse.Namespace) -> Figures | None:
    """One run of mergekit, without its start-up."""
    config, out = place / "config.yml", place / "theirs"
    config.write_text(text)
    _warm(inputs, place)
    command = [arguments.mergekit, str(config), str(out), "--quiet", "--no-copy-tokenizer"]
    found = _watched(command, arguments.mergekit_limit, place / "log")
    shutil.rmtree(out, ignore_errors=True)
    return found and found._replace(seconds=found.seconds - arguments.mergekit_start, start=arguments.mergekit_start)


def _watched(command: Sequence[str], limit: float, log: Path) -> Figures | None:
    """A command run to its end; None if that is an error, or does not come in time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, private, rss = time.perf_counter(), 0, 0
    with log.open("w") as f, subprocess.Popen(command, stdout=f, stderr=f) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            private = max(private, _status(status, "RssAnon"))
            rss = max(rss, _status(status, "VmHWM"))
            if time.perf_counter() - started > limit:
                process.kill()
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figures(seconds, cpu, private, rss) if process.returncode == 0 else None


def _starts(arguments: argparse.Namespace) -> dict[str, float]:
    """What each tool takes to begin: the command line's help, and everything that a merge imports."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        ours = [sys.executable, "-m", "calmerge.cli"]
        found = {"calmerge --help": _least([*ours, "--help"], log)}
        imports = "import calmerge; calmerge.save, calmerge.ties"
        found["calmerge, imports of a merge"] = _least([sys.executable, "-c", imports], log)
        if importlib.util.find_spec("numba"):
            imports += f"; {NUMBA}"
            found["calmerge, imports of a large merge, with numba"] = _least([sys.executable, "-c", imports], log)
        if arguments.mergekit:
            found["mergekit-yaml --help"] = _least([arguments.mergekit, "--help"], log)
            arguments.mergekit_start = found["mergekit-yaml --help"]
    for what, seconds in found.items():
        _say(f"start-up of {what}: {seconds:.2f} s")
    return found


def _least(command: Sequence[str], log: Path) -> float:
    runs = [_watched(command, 120, log) for _ in range(3)]
    return min((run.seconds for run in runs if run), default=float("nan"))


def _curve(place: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory by number of experts, on a smaller model."""
    rows = []
    models = Models.make(place / "curve", arguments.curve_params, max(arguments.curve), "5GB")
    for name in arguments.curve_methods:
        case = CASES.get(name, Case(name))
        for n in arguments.curve:
            some = Models(models.base, models.experts[:n])
            with tempfile.TemporaryDirectory(dir=place) as out:
                limit, _ = _limit(some.inputs(case), Path(out), arguments.threads)
                job = {"inputs": [str(p) for p in some.inputs(case)], "threads": arguments.threads, "out": out}
                took = _calmerge(
                    job | {"method": case.method, "options": dict(case.options), "streamed": True}, arguments.repeats
                )
            rows.append({"method": name, "experts": n, "limit": limit.seconds} | took._asdict())
            _say(
                f"{name:20} {n:3} experts: {took.seconds:6.2f} s, {took.seconds / n * 1e3:6.1f} ms an expert, "
                f"processor {took.cpu:6.2f} s, private {took.private / 1e6:5.0f} MB"
            )
    return rows


def _many(place: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A model of many tiny tensors: what a tensor costs, whatever its size."""
    rows = []
    models = Models.tiny(place / "tiny", arguments.tensors, arguments.experts)
    for name in ("task_arithmetic", "ties", "mergekit_ties"):
        case = CASES[name]
        if missing := _missing(case):
            _say(f"{name}: skipped, {missing}")
            continue
        with tempfile.TemporaryDirectory(dir=place) as out:
            job = {"inputs": [str(p) for p in models.inputs(case)], "threads": arguments.threads, "out": out}
            took = _calmerge(
                job | {"method": case.method, "options": dict(case.options), "streamed": False}, arguments.repeats
            )
        rows.append({"method": name, "tensors": arguments.tensors} | took._asdict())
        _say(f"{name:20} {arguments.tensors} tiny tensors: {took.seconds:.2f} s, processor {took.cpu:.2f} s")
    return rows


# Small things --------------------------------------------------------------------------------------------------


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
    else:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)


def _status(file: Path, key: str) -> int:
    """One figure of a process, in bytes; 0 where there is none, or no process any more."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return max((int(line[1]) * 1024 for line in lines if line and line[0] == f"{key}:"), default=0)


def _size(file: Path) -> int:
    return file.stat().st_size


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _machine(threads: int) -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def _shown(arguments: argparse.Namespace) -> dict[str, str]:
    return {key: str(value) for key, value in vars(arguments).items() if value is not None}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
