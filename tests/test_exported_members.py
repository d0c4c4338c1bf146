"""What `import calmerge` brings, and what it leaves alone."""

import ast
import inspect
import subprocess
import sys

import pytest

import calmerge
from calmerge import _errors


def test_the_public_names_are_sorted_and_exist() -> None:
    assert list(calmerge.__all__) == sorted(set(calmerge.__all__))
    assert all(hasattr(calmerge, name) for name in calmerge.__all__)


def test_type_checkers_see_the_same_names_from_the_same_places() -> None:
    tree = ast.parse(inspect.getsource(calmerge))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imported for alias in node.names if "calmerge." in str(node.module)}
    assert seen == {name: f"calmerge.{home}" for name, home in calmerge._HOME.items()}
    assert sorted(seen) == dir(calmerge) == calmerge.__all__


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'calmerge' has no attribute 'mergee'"):
        calmerge.mergee  # noqa: B018


def test_every_error_is_public_and_documented() -> None:
    errors = {n: e for n, e in vars(_errors).items() if inspect.isclass(e) and issubclass(e, calmerge.CalmergeError)}
    assert set(errors) <= set(calmerge.__all__)
    assert all(f"{name} " in _errors.__doc__ or f"{name}(" in _errors.__doc__ for name in errors)


def test_every_public_name_says_what_it_is() -> None:
    assert [n for n in calmerge.__all__ if n != "Merge" and not inspect.getdoc(getattr(calmerge, n))] == []


def imported_by(statement: str, *packages: str) -> str:
    code = f"{statement}\nimport sys; print(sorted(set({packages!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


OPTIONAL = ("transformers", "datasets", "matplotlib", "pyarrow", "pandas", "PIL", "huggingface_hub", "fontTools")


def test_importing_the_package_does_not_import_torch() -> None:
    assert imported_by("import calmerge", "torch", "pydantic", *OPTIONAL) == "[]"


def test_no_part_of_the_core_imports_an_optional_package() -> None:
    names = ", ".join(f"calmerge.{home}" for home in dict.fromkeys(calmerge._HOME.values()))
    assert imported_by(f"import calmerge.methods, calmerge.recipe, {names}", *OPTIONAL) == "[]"
