"""What `calmerge list` and `calmerge explain` say, read from the functions themselves: signature and docstring."""

import ast
import doctest
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calmerge._errors import UsageError, did_you_mean
from calmerge._pipe import PROVIDED, Methods, gives_task_vectors, needs_tasks, takes_merged
from calmerge._signature import Option, name_of, options_of
from calmerge._yaml import dump


@dataclass(frozen=True)
class Explanation:
    """A method in words.

    Attributes:
        summary: what comes out, in one line.
        formula: the formula and what else stands above the arguments.
        options: name, type, range, default and meaning of each.
        source: authors, title, venue, repository, and where calmerge differs.
        data: what the method needs besides weights.
        cost: how often it reads the inputs, and its memory class; of one that learns, what it holds.
        example: calls in Python, with what they give.
        recipe: a recipe that calls it.
    """

    name: str
    summary: str
    formula: str
    options: list[dict[str, str]]
    source: str
    data: str
    cost: str
    example: str
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def explanation(name: str, methods: Methods | None = None) -> Explanation:
    """The method called `name`, in words.

    Raises:
        UsageError: there is none.

    >>> found = explanation("ties")
    >>> found.options[0]["name"], found.options[0]["range"], found.options[0]["default"]
    ('keep', '(0, 1]', '0.2')
    """
    methods = methods if methods is not None else _methods()
    if name not in methods:
        raise UsageError(f"no method is called '{name}'. {did_you_mean(name, methods)}")
    fn = methods[name]
    parts = parts_of_docstring(fn)
    return Explanation(
        name=name,
        summary=parts["summary"],
        formula=parts["formula"],
        options=[_option(o, parts["args"]) for o in options_of(fn, PROVIDED).values()],
        source=parts["source"],
        data=_data(fn),
        cost=_cost(fn),
        example=_example(fn),
        recipe=_recipe(name, fn),
    )


def _cost(fn: Callable[..., Any]) -> str:
    from calmerge._catalogue import cost

    passes, memory = cost(fn)
    if passes is None:
        return held_in_memory(fn)
    times = "once" if passes == 1 else f"{passes} times"
    return f"reads the inputs {times}; memory class {memory}, with the defaults"


def _example(fn: Callable[..., Any]) -> str:
    """The example of a docstring as it stands, without its imports."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(fn) or "")
    lines = [
        line
        for e in examples
        if not e.source.startswith("import ")
        for line in [*_prompted(e.source), *e.want.splitlines()]
    ]
    return "\n".join(lines)


def _prompted(source: str) -> list[str]:
    first, *rest = source.splitlines()
    return [f">>> {first}", *(f"... {line}" for line in rest)]


def held_in_memory(fn: Callable[..., Any]) -> str:
    """What a function's docstring says that it holds in memory, where it says so."""
    found = re.search(r"^Held in memory: (.*?)\n\n", (inspect.getdoc(fn) or "") + "\n\n", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _methods() -> Methods:
    from calmerge.methods import METHODS

    table: Methods = METHODS
    return table


def _data(fn: Callable[..., Any]) -> str:
    return "unlabelled" if needs_tasks(fn) else "none"


def _option(option: Option, meanings: dict[str, str]) -> dict[str, str]:
    default = option.default
    shown = "required" if option.required else name_of(default) if callable(default) else str(default)
    return {
        "name": option.name,
        "type": option.type,
        "range": option.range,
        "default": {"None": "-", "()": "-", "True": "true", "False": "false"}.get(shown, shown),
        "meaning": meanings.get(option.name, ""),
    }


def parts_of_docstring(fn: Callable[..., Any]) -> dict[str, Any]:
    """The sections of a docstring that follows the house's template."""
    text = inspect.getdoc(fn) or ""
    summary, _, rest = text.partition("\n")
    above = re.split(r"^(?:Args|Returns|Raises|>>>|Source|Differences)\b.*", rest, maxsplit=1, flags=re.MULTILINE)[0]
    above = above.split("\n>>> ")[0]
    args = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", rest, flags=re.MULTILINE)
    source = re.search(r"^Source:(.*)", rest, flags=re.MULTILINE | re.DOTALL)
    return {
        "summary": summary.strip(),
        "formula": above.strip(),
        "args": _meanings(args[1], list(options_of(fn))) if args else {},
        "source": inspect.cleandoc("Source:" + source[1]) if source else "",
    }


def _meanings(block: str, options: Sequence[str]) -> dict[str, str]:
    """What an "Args:" block says of each option, be they on lines of their own or "a: ...; b: ..." on one."""
    if not options:
        return {}
    words = " ".join(block.split())
    cuts = re.split(rf"(?:^|(?<= ))({'|'.join(map(re.escape, options))}): ", words)
    return {name: text.strip().rstrip(";") for name, text in zip(cuts[1::2], cuts[2::2], strict=True)}


def example_options(fn: Callable[..., Any]) -> dict[str, Any]:
    """Values for the options that a function demands, as the example in its docstring gives them."""
    source = "\n".join(e.source for e in doctest.DocTestParser().get_examples(inspect.getdoc(fn) or ""))
    required = {o.name for o in options_of(fn, PROVIDED).values() if o.required}
    found: dict[str, Any] = {}
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        if isinstance(call.func, ast.Name) and call.func.id == name_of(fn):
            found |= {
                word.arg: ast.literal_eval(word.value)
                for word in call.keywords
                if word.arg in required and _is_literal(word.value)
            }
    return found


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _recipe(name: str, fn: Callable[..., Any]) -> str:
    """A recipe with the first options at their defaults, as something to start from."""
    options = example_options(fn) | {
        o.name: o.default
        for o in options_of(fn, PROVIDED).values()
        if isinstance(o.default, (bool, int, float, str)) and o.name != "seed"
    }
    step = {name: dict(list(options.items())[:3])} if options else name
    pipe = ["average", step] if takes_merged(fn) else [step]
    if gives_task_vectors(fn):
        pipe.append("task_arithmetic")
    if needs_tasks(fn):
        return dump({"tasks": {"suite": "text"}, "merge": pipe, "out": "merged"})
    experts = {"cars": "./cars", "dtd": "./dtd"}
    return dump({"base": "./base", "experts": experts, "merge": pipe, "out": "merged"})
