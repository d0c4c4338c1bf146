"""The command line: each verb opens files, calls one public function, and prints what came back.

Only typer is imported here; torch and the rest load inside the verbs, so that help answers at once. Results go to the
output stream, progress and errors to the error stream. Exit code 2 is wrong usage, 1 any other failure.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from calmerge._errors import CalmergeError, OutputError, UsageError

if TYPE_CHECKING:
    from calmerge._run import Run

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on the output stream.")]
SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="'text', 'vision', or the path of a suite file.")]


class _Group(TyperGroup):
    """Turns calmerge's errors, and Ctrl-C, into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CalmergeError as e:
            if ctx.params.get("debug"):
                raise
            _fail(e)
        except KeyboardInterrupt:
            typer.echo(
                "stopped; what was finished is kept: the same command goes on from there "
                "(merge, extract-lora: with --resume).",
                err=True,
            )
            raise typer.Exit(130) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


class _Merge(TyperCommand):
    """Understands the options of mergekit's command line too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(a.startswith("-") for a in args):
            from calmerge.mergekit.flags import translated

            args = translated(args)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """The entry point `calmerge`."""
    app(prog_name="calmerge")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"calmerge {version('calmerge')}")
        raise typer.Exit


@app.callback()
def _top(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Example: calmerge demo

    Merges fine-tuned checkpoints of one base model into one multi-task model, without retraining and without labels.
    """


@app.command(short_help="Make experts, merge them with every method, and show the table and the page.")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("calmerge-demo"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge demo

    Fetches a small suite into the cache, fine-tunes its experts if they are not there, merges them with averaging, Task
    Arithmetic, TIES, AdaMerging and CALM, and evaluates all on test data. Run it again, and it goes on where it was.
    """
    from calmerge.suites.demo import run_demo

    _show().report(run_demo(out=out, run=_run(quiet)), out, as_json=as_json)


@app.command(cls=_Merge, short_help="Merge as a recipe, or mergekit's YAML, says.")
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (docs/recipes.md), or mergekit's YAML.")],
    place: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="The same as --out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; the recipe's if not given.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, read no tensor.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; the base's if not given.")
    ] = None,
    shard: Annotated[str | None, typer.Option("--shard", help="The most that one file holds, as in 5GB.")] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Private memory that the process may take, as in 2GB.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of methods that draw; the recipe's if not given.")
    ] = None,
    preference: Annotated[
        str | None, typer.Option("--preference", help="Among tasks, for map_front: cars=0.7,dtd=0.3.")
    ] = None,
    front: Annotated[
        str | None, typer.Option("--front", help="A folder by map_front whose front is picked from; nothing is fitted.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what a stopped run of the same merge had finished.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge merge recipe.yaml --out merged/

    The folder holds the merged backbone, one head per task, the report, a model card, and calmerge.json with recipe,
    versions and hashes. It appears when it is whole. What a stopped run had finished is kept beside it: call again with
    --resume to go on from there, or without to begin anew.
    """
    from calmerge._recipe_run import open_inputs, preview, run_recipe
    from calmerge.methods.map_front import front_of
    from calmerge.recipe import load_recipe, with_last, with_out, with_seed

    if place is not None and out is not None:
        raise UsageError(f"the folder of the result is given twice: '{place}' and --out '{out}'.")
    out = out or place
    checked = with_out(
        with_last(with_seed(load_recipe(recipe), seed), preference=_weights(preference), front=front),
        dtype=dtype,
        shard=shard,
        max_memory=max_memory,
    )
    if dry_run:
        found = preview(checked, open_inputs(checked)).to_dict() | ({"out": str(out)} if out else {})
        _show().emit(found, as_json, lambda: _show().preview(found))
        return
    manifest = run_recipe(checked, out=out, resume=resume, command=_command(), run=_run(quiet))
    where = out or checked.out.path
    _show().emit(manifest, as_json, lambda: _show().merged(manifest, str(where)))
    found_front = None if as_json or where is None else front_of(where)
    if found_front is not None:
        _show().front(found_front)


def _weights(text: str | None) -> dict[str, float] | None:
    """ "cars=0.7,dtd=0.3" as numbers by task."""
    if text is None:
        return None
    try:
        return {task.strip(): float(weight) for task, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UsageError(f"--preference must be written as cars=0.7,dtd=0.3, got '{text}'.") from None


@app.command("eval", short_help="Score a merged folder on a suite's test data.")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'calmerge merge' wrote.")],
    suite: Annotated[str, typer.Option("--suite", help="'text', 'vision', or the path of a suite file.")],
    split: Annotated[str, typer.Option("--split", help="'test' or 'validation'.")] = "test",
    experts: Annotated[bool, typer.Option("--experts", help="Score the experts too, for comparison.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge eval merged/ --suite text

    Prints the accuracy of every task, with its standard error, under the head of the task's own expert.
    """
    from calmerge._evaluate import evaluate as score
    from calmerge.suites.suite import load_suite

    if split not in ("test", "validation"):
        raise UsageError(f"--split must be 'test' or 'validation', got '{split}'.")
    scores = score(folder, load_suite(suite), split=split, experts=experts, run=_run(quiet))  # type: ignore[arg-type]
    plain = {who: {task: s.model_dump() for task, s in found.items()} for who, found in scores.items()}
    _show().emit(plain, as_json, lambda: _show().scores(plain))


@app.command(short_help="Compare methods on a suite, with a table and a page.")
def bench(
    suite: SuiteName,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names with commas between; all if not given.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds methods run with that draw.")] = 3,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Names with commas between; all if not given.")] = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Let methods that learn run once more, on the test inputs.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks, one seed, fewer updates: a look only.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the report; bench-SUITE if not given.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge bench text --methods ties,calm --seeds 1

    Fetches or makes what the suite lacks, merges its experts with every method, and evaluates all on test data. The
    table goes to the terminal, to report.csv and to report.html. Rows that are finished are kept in the folder and used
    again, so that a method added later runs alone.
    """
    from calmerge.league import run_bench
    from calmerge.suites.suite import load_suite

    loaded = load_suite(suite)
    names = _names(tasks, loaded.tasks, "task")
    folder = out or Path(f"bench-{loaded.name}")
    report = run_bench(
        loaded,
        methods=_names(methods, None, "method"),
        seeds=range(seeds),
        transductive=transductive,
        quick=quick,
        tasks=names,
        command=_command(),
        run=_run(quiet),
        out=folder,
    )
    _show().report(report, folder, as_json=as_json)


@app.command(short_help="Show how experts relate: norms, cosines, sign conflicts, odd tensors.")
def inspect(
    inputs: Annotated[
        list[str], typer.Argument(metavar="RECIPE | SUITE | BASE EXPERT...", help="Checkpoints may be NAME=PATH.")
    ],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge inspect base/ experts/cars experts/dtd

    Reads a recipe, a suite, or a base and its experts; prints how long every task vector is, the cosines and sign
    conflicts between them, tensors that never moved, and whether the checkpoints seem to share a base.
    """
    from calmerge.inspect import inspect_task_vectors

    found = inspect_task_vectors(_task_vectors_of(inputs), run=_run(quiet))
    _show().emit(found.to_dict(), as_json, lambda: _show().inspection(found))


@app.command("list", short_help="List the methods: needs, passes, memory class, paper.")
def list_methods(as_json: Json = False) -> None:
    """Example: calmerge list

    One line for each method: the data it needs, how often it reads the inputs, what it holds in memory, its paper.
    """
    from calmerge._catalogue import catalogue

    entries = catalogue()
    _show().emit([e.to_dict() for e in entries], as_json, lambda: _show().methods(entries))


@app.command(short_help="Explain a method, or every parameter of a recipe.")
def explain(
    method: Annotated[str | None, typer.Argument(metavar="METHOD", help="A name from 'calmerge list'.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A recipe, whose parameters are printed instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Example: calmerge explain ties

    Prints what the method computes, its options with types, ranges and defaults, its cost, where it comes from, and how
    it is called. With --recipe r.yaml: every parameter of every step with its value, and for which tensors it holds.
    """
    if (method is None) == (recipe is None):
        raise UsageError("name a method, as in 'calmerge explain ties', or a recipe, as in '--recipe recipe.yaml'.")
    if recipe is not None:
        rows = _settings(recipe)
        _show().emit([s.to_dict() for s in rows], as_json, lambda: _show().settings(rows))
        return
    from calmerge._explain import explanation

    found = explanation(str(method))
    _show().emit(found.to_dict(), as_json, lambda: _show().explained(found))


@app.command(short_help="Check a recipe or a suite without running it.")
def validate(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe or a suite file.")],
    values: Annotated[
        bool, typer.Option("--values", help="Read all inputs too, and name tensors with NaN or infinite entries.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge validate recipe.yaml

    Names every mistake with its line, checks that the files are there and the checkpoints fit, and prints the plan:
    what is merged, passes, bytes and memory. From headers alone; 'merge --dry-run' is the same with merge's options.
    """
    from calmerge._yaml import load_documents

    if load_documents(file)[0].get("suite") is not None:
        if values:
            raise UsageError(f"{file.name} is a suite, which has no checkpoints; --values is for recipes.")
        found = _validate_suite(file)
    else:
        from calmerge._recipe_run import open_inputs, preview
        from calmerge._values import check_values
        from calmerge.recipe import load_recipe

        checked = load_recipe(file)
        tvs = open_inputs(checked)
        found = preview(checked, tvs).to_dict()
        if values:
            check_values(tvs, run=_run(quiet))

    def show() -> None:
        typer.echo(f"{file.name} is fine{': ' if found['tasks'] else ''}{', '.join(found['tasks'])}.")
        if "steps" in found:
            typer.echo()
            _show().preview(found)

    _show().emit(found, as_json, show)


@app.command(short_help="Check that a folder is as it was written.")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'calmerge merge' or 'export' wrote.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge verify merged/

    Compares every file with its hash in calmerge.json, and headers with the index of shards; names files that are
    missing, changed, or hold weights of something else. Exit code 1 if there are any.
    """
    from calmerge._verify import verify as faults_of

    faults = faults_of(folder, run=_run(quiet))
    sound = f"{folder} is as it was written."
    _show().emit({"faults": faults}, as_json, lambda: typer.echo("\n".join(faults) or sound))
    if faults:
        raise typer.Exit(1)


@app.command(short_help="Print mergekit's YAML as a recipe.")
def convert(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A file written for mergekit.")],
    out: Annotated[Path | None, typer.Option("--out", help="A file for the recipe; printed if not given.")] = None,
) -> None:
    """Example: calmerge convert config.yml --out recipe.yaml

    The recipe merges the same models to the same bytes. Models are opened, from their headers alone, where parameters
    differ from tensor to tensor. Paths start where you are, so keep the recipe here, or give it a place with --out.
    """
    from calmerge.mergekit import convert_file
    from calmerge.report.results import write_text

    if out is not None and out.exists():
        raise OutputError(f"'{out}' is there already; name another file, or remove it.")
    text = convert_file(file, out=out)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        typer.echo(f"wrote the recipe to {out}")


@app.command(short_help="Write one task's full model.")
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'calmerge merge' wrote.")],
    task: Annotated[str, typer.Option("--task", help="One of its tasks.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the model; FOLDER-TASK if not given.")] = None,
    quiet: Quiet = False,
) -> None:
    """Example: calmerge export merged/ --task cars --out cars/

    What comes out is loaded like the expert was, with AutoModelFor...Classification.from_pretrained.
    """
    from calmerge import export as write

    place = out or folder.with_name(f"{folder.resolve().name}-{task}")
    write(folder, task, place, run=_run(quiet))
    typer.echo(f"wrote the model of task '{task}' to {place}")


@app.command("extract-lora", short_help="Write what an expert adds to its base as a LoRA adapter.")
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the expert was fine-tuned from.")],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="The fine-tuned model, or an adapter to be cut.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the adapter.")],
    rank: Annotated[
        int | None, typer.Option("--rank", help="Singular values kept per module; 16 if nothing is said.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of the squared singular values kept per module, as 0.95.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Keep all singular values.")] = False,
    no_full: Annotated[
        bool, typer.Option("--no-full", help="Leave norms, biases and the like out; their norms are printed.")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Shell pattern of tensors that stay the base's.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the factors that a stopped run of the same command had found.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Example: calmerge extract-lora base/ tuned/ adapter/ --rank 16

    Singular values are found in float64 from float32 differences, whatever is stored. Prints every tensor with its rank
    and error; the folder loads with PEFT.
    """
    from calmerge._save_adapter import extract_lora

    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    if exact and (rank is not None or energy is not None):
        raise UsageError("--exact keeps everything; leave --rank and --energy out.")
    if rank is None and energy is None and not exact:
        rank = 16
    import torch

    manifest = extract_lora(
        base, expert, out, rank=rank, energy=energy, full=not no_full, exclude=tuple(exclude or ()),
        dtype=getattr(torch, dtype), resume=resume, run=_run(quiet),
    )  # fmt: skip
    _show().emit(manifest, as_json, lambda: _show().adapter(manifest["modules"], out))


# Between the terminal and the functions ------------------------------------------------------------------------


def _fail(error: CalmergeError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2 if isinstance(error, UsageError) else 1)


def _run(quiet: bool) -> "Run":
    from calmerge._console import console_progress, show_notes
    from calmerge._run import Run

    show_notes(quiet=quiet)
    return Run(progress=console_progress(quiet=quiet))


def _settings(file: Path) -> Any:
    """The settings of a recipe; the tensors they hold for, where its checkpoints can be opened."""
    from calmerge._recipe_run import open_inputs
    from calmerge._settings import settings
    from calmerge.recipe import load_recipe

    recipe = load_recipe(file)
    try:
        names = list(open_inputs(recipe))
    except CalmergeError:  # 'validate' tells what is wrong with them
        names = []
    return settings(recipe, names)


def _show() -> Any:
    from calmerge import _show

    return _show


def _command() -> str:
    """What the user typed, without the folder of the program."""
    return shlex.join(["calmerge", *sys.argv[1:]])


def _names(text: str | None, known: Any, what: str) -> list[str] | None:
    """The names in "a,b", each one of `known` where that is given."""
    from calmerge._errors import did_you_mean

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--{what}s names none; write them with commas between, as in --{what}s a,b.")
    for name in names:
        if known is not None and name not in known:
            raise UsageError(f"no {what} is called '{name}'. {did_you_mean(name, known)}")
    return names


def _task_vectors_of(inputs: list[str]) -> Any:
    """The task vectors of a recipe, of a suite, or of a base and its experts."""
    from calmerge import task_vectors
    from calmerge._recipe_run import open_inputs
    from calmerge._yaml import load
    from calmerge.recipe import load_recipe
    from calmerge.suites.suite import embedded_suites, load_suite

    first = inputs[0]
    if len(inputs) > 1:
        experts: dict[str, str] = {}
        for text in inputs[1:]:
            name, _, path = text.rpartition("=")
            name = name or Path(path).resolve().name
            if name in experts:
                raise UsageError(f"two experts are called '{name}'; name them, as in {name}2={path}.")
            experts[name] = path
        return task_vectors(first, experts)
    if first in embedded_suites() or (first.endswith((".yaml", ".yml")) and load(first).get("suite") is not None):
        suite = load_suite(first)
        return task_vectors(suite.base, suite.experts, exclude=suite.exclude, heads=suite.heads)
    if first.endswith((".yaml", ".yml")):
        return open_inputs(load_recipe(first))
    raise UsageError(f"'{first}' is no recipe and no suite; a base needs its experts behind it, as in 'base/ cars/'.")


def _validate_suite(file: Path) -> dict[str, Any]:
    from calmerge import CheckpointError
    from calmerge.suites.suite import load_suite, missing_files

    suite = load_suite(file)
    missing = [] if suite.embedded else missing_files(suite)
    if missing:
        raise CheckpointError("\n".join(missing))
    return {"suite": suite.name, "version": suite.version, "tasks": list(suite.tasks)}


if __name__ == "__main__":
    main()
