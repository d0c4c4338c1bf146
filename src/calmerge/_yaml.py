"""YAML that remembers where everything stood, so that every mistake can name its file and line.

Scalars follow YAML 1.2: `1e-4` is a number, `no`, `on` and `2024-01-01` are text. Keys are text as written. A key given
twice, tags, merge keys and more than one document are errors; nothing in a file can run code.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calmerge._errors import UsageError, did_you_mean
from calmerge._signature import raise_together

Data = bool | int | float | str | list["Data"] | dict[str, "Data"] | None

MAX_BYTES = 4_000_000
MAX_NODES = 200_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class Node:
    """A value and the place where it stood: "recipe.yaml:9", of a mapping's entries the line of the key.

    Attributes:
        value: a scalar, a list of nodes, or a dict of nodes by key.
    """

    value: Any
    where: str

    def plain(self) -> Data:
        """The value without places.

        >>> parse("keep: [0.2, 1e-4]", "recipe.yaml").plain()
        {'keep': [0.2, 0.0001]}
        """
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value  # type: ignore[no-any-return]

    def is_mapping(self) -> bool:
        """Whether entries can be had by key."""
        return isinstance(self.value, dict)

    def is_list(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self.value, list)

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """The entries of a mapping; none of anything else."""
        yield from self.value.items() if isinstance(self.value, dict) else ()

    def get(self, key: str) -> "Node | None":
        """The entry `key` of a mapping, or None."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def lines(self) -> dict[str, str]:
        """Place by key, and the mapping's own under the empty key, as `check` takes them.

        >>> parse("a: 1", "r.yaml").lines()
        {'': 'r.yaml:1', 'a': 'r.yaml:1'}
        """
        return {"": self.where, **{key: node.where for key, node in self.items()}}


def load(path: str | Path) -> Node:
    """The content of a YAML file.

    Raises:
        UsageError: no such file, no text, or no valid YAML; with file and line.
    """
    path = Path(path).expanduser()
    return parse(_text(path), path.name)


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES / 1e6:g} MB; is this a YAML file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file.{_neighbours(path)}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; a YAML file was expected.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8; a YAML file was expected.") from None
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}).") from None


def parse(text: str, name: str) -> Node:
    """The content of YAML text; `name` is what messages call the file.

    >>> node = parse("merge:\\n  ties: {keep: 0.2}", "recipe.yaml")
    >>> node.get("merge").get("ties").get("keep")
    Node(value=0.2, where='recipe.yaml:2')
    >>> parse("a: 1\\nb: 2\\na: 3", "recipe.yaml")
    Traceback (most recent call last):
    calmerge._errors.UsageError: recipe.yaml:3: the key 'a' was given before, on line 1. Remove one of the two.
    """
    return only_document([_read(tree, name) for tree in _compose(text, name)], name)


def only_document(documents: Sequence[Node], name: str) -> Node:
    """The one document of a file that may have no more."""
    if len(documents) > 1:
        raise UsageError(
            f"{documents[1].where}: not valid YAML (a second document). Keep one document only, without a second '---'."
        )
    return documents[0]


def load_documents(path: str | Path) -> list[Node]:
    """The documents of a YAML file, one or several with `---` between."""
    path = Path(path).expanduser()
    return [_read(tree, path.name) for tree in _compose(_text(path), path.name)]


def _compose(text: str, name: str) -> list[yaml.Node]:
    """The documents of a text that hold something."""
    try:
        trees = [tree for tree in yaml.compose_all(text, Loader=_Loader) if tree is not None]
    except yaml.MarkedYAMLError as e:
        raise UsageError(_syntax(e, text, name)) from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise UsageError(f"{name}:{line}: the character {chr(e.character)!r} may not stand in YAML.") from None
    except RecursionError:
        raise UsageError(f"{name}: nested too deeply; {MAX_DEPTH} levels are the most.") from None
    if not trees:
        raise UsageError(f"{name}: the file is empty.")
    return trees


def _read(tree: yaml.Node, name: str) -> Node:
    reading = _Reading(name)
    node = reading.node(tree, tree.start_mark.line, ())
    raise_together(reading.problems)
    return node


def from_data(data: Any, name: str) -> Node:
    """Plain Python data as nodes; the place is the path of keys, "recipe: merge[0].ties".

    >>> from_data({"merge": ["ties"]}, "recipe").get("merge").value[0]
    Node(value='ties', where='recipe: merge[0]')
    """
    return _from_data(data, name, "")


def dump(data: Any, *, compact: bool = False) -> str:
    """Plain data as YAML that `parse` reads back to the same; keys in their order.

    Args:
        data: scalars, lists and mappings.
        compact: whether a list or mapping of scalars is written on one line.

    >>> print(dump({"experts": {"no": "./a"}, "merge": [{"ties": {"keep": 1e-05}}]}), end="")
    experts:
      no: ./a
    merge:
    - ties:
        keep: 1.0e-05
    """
    style = None if compact else False
    return str(
        yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=style)
    )


class _Reading:
    """One pass over a composed file, collecting mistakes."""

    def __init__(self, name: str) -> None:
        self.name, self.problems, self._count = name, list[str](), 0

    def node(self, tree: yaml.Node, line: int, above: tuple[int, ...]) -> Node:
        where = f"{self.name}:{line + 1}"
        self._count += 1
        if self._count > MAX_NODES:
            raise UsageError(f"{where}: more than {MAX_NODES} values once aliases (*) are written out. Use fewer.")
        if id(tree) in above:
            raise UsageError(f"{where}: an alias (*) that contains itself.")
        if len(above) >= MAX_DEPTH:
            raise UsageError(f"{where}: nested too deeply; {MAX_DEPTH} levels are the most.")
        above = (*above, id(tree))
        if isinstance(tree, yaml.ScalarNode):
            return Node(self._scalar(tree, where), where)
        if tree.tag not in _COLLECTIONS:
            self._refuse_tag(tree, where)
        if isinstance(tree, yaml.SequenceNode):
            return Node([self.node(t, t.start_mark.line, above) for t in tree.value], where)
        return Node(self._mapping(tree, above), where)

    def _mapping(self, tree: yaml.Node, above: tuple[int, ...]) -> dict[str, Node]:
        result: dict[str, Node] = {}
        first: dict[str, int] = {}
        for key, value in tree.value:
            line = key.start_mark.line
            where = f"{self.name}:{line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{where}: a key must be text, not a list or a mapping.")
            elif key.tag == _MERGE:
                self.problems.append(f"{where}: merge keys (<<) are not supported. Write the entries out.")
            elif key.value in result:
                self.problems.append(
                    f"{where}: the key '{key.value}' was given before, on line {first[key.value]}. "
                    "Remove one of the two."
                )
            else:
                first[key.value] = line + 1
                result[key.value] = self.node(value, line, above)
        return result

    def _scalar(self, tree: yaml.ScalarNode, where: str) -> bool | int | float | str | None:
        text = tree.value
        match tree.tag:
            case "tag:yaml.org,2002:str":
                return str(text)
            case "tag:yaml.org,2002:null":
                return None
            case "tag:yaml.org,2002:bool" if text.lower() in ("true", "false"):
                return bool(text.lower() == "true")
            case "tag:yaml.org,2002:int" if _INT.fullmatch(text):
                return int(text[2:], 8 if text[1] == "o" else 16) if text[:2] in ("0o", "0x") else int(text)
            case "tag:yaml.org,2002:float" if _FLOAT.fullmatch(text) or _INT.fullmatch(text):
                return float(re.sub(r"\.(?=[in])", "", text.lower()))
        self._refuse_tag(tree, where)
        return None

    def _refuse_tag(self, tree: yaml.Node, where: str) -> None:
        tag = tree.tag.replace("tag:yaml.org,2002:", "!!")
        self.problems.append(f"{where}: the tag {tag} does not fit here. Tags are not needed; remove it.")


_MERGE = "tag:yaml.org,2002:merge"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_INT = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,4000}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BREAKS = re.compile("[\r\x85\u2028\u2029]")
_PLAIN = {  # YAML 1.2, core schema: tag, pattern, first characters; in order
    "bool": (re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
    "null": (re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "int": (_INT, "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
    "merge": (re.compile("<<"), "<"),
}


class _Loader(yaml.SafeLoader):
    """Composes only; with the scalars of YAML 1.2 in place of PyYAML's 1.1."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for something else, and repeats values instead of aliasing them."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text with line breaks other than a line feed only survives between double quotes."""
        style = '"' if _BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _tag, (_pattern, _first) in _PLAIN.items():
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))


def _from_data(data: Any, name: str, path: str) -> Node:
    where = f"{name}: {path}" if path else name
    if isinstance(data, Mapping):
        entries = {str(k): _from_data(v, name, f"{path}.{k}" if path else str(k)) for k, v in data.items()}
        return Node(entries, where)
    if isinstance(data, Sequence) and not isinstance(data, str):
        return Node([_from_data(v, name, f"{path}[{i}]") for i, v in enumerate(data)], where)
    return Node(str(data) if isinstance(data, Path) else data, where)


def _syntax(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    """One sentence for a syntax error, with the cause that is common for it."""
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    lines = text.splitlines()
    shown = lines[line] if line < len(lines) else ""
    problem = error.problem or error.context or "not valid"
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in problem:
        advice = "Lines are indented with spaces in YAML; replace the tab."
    elif "mapping values are not allowed" in problem:
        advice = "Check the indentation, and quote text that holds ': '."
    elif "undefined alias" in problem or "scanning an alias" in (error.context or ""):
        advice = "Quote text that begins with '*'."
    else:
        advice = "Check indentation, brackets and quotes around here."
    return f"{name}:{line + 1}: not valid YAML ({problem}). {advice}"


def _neighbours(path: Path) -> str:
    """Names of YAML files beside a missing one."""
    folder = path.parent
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []
    return f" {did_you_mean(path.name, names)}" if names else ""
