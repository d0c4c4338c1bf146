"""YAML with lines: what is read, and what is refused with its place."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calmerge import UsageError
from calmerge._yaml import MAX_BYTES, dump, from_data, load, parse


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as e:
        parse(text, "r.yaml")
    return str(e.value)


def test_every_value_knows_its_line() -> None:
    node = parse("base: ./b\nmerge:\n  - trim\n  - ties:\n      keep: 0.2\n", "r.yaml")
    steps = node.value["merge"].value
    assert [node.where, node.get("base").where, steps[0].where] == ["r.yaml:1", "r.yaml:1", "r.yaml:3"]
    assert steps[1].get("ties").get("keep").where == "r.yaml:5"
    assert node.plain() == {"base": "./b", "merge": ["trim", {"ties": {"keep": 0.2}}]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("12", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("017", 17),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("20%", "20%"),
        ("'1'", "1"),
        ("!!str 5", "5"),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"a: {text}", "r.yaml").plain()["a"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse("a: .nan", "r.yaml").plain()["a"])


def test_keys_are_text() -> None:
    assert parse("{1: a, true: b, no: c}", "r.yaml").plain() == {"1": "a", "true": "b", "no": "c"}


def test_aliases_repeat_values() -> None:
    node = parse("a: &x {keep: 0.2}\nb: *x\n", "r.yaml")
    assert node.plain()["b"] == {"keep": 0.2}


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    assert refusal("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n") == (
        "2 mistakes:\n"
        "  r.yaml:4: the key 'c' was given before, on line 3. Remove one of the two.\n"
        "  r.yaml:5: the key 'a' was given before, on line 1. Remove one of the two."
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n\tb: 2", "r.yaml:2: not valid YAML (found character '\\t' that cannot start any token). Lines are ind"),
        ("a: 1\n b: 2", "r.yaml:2: not valid YAML (mapping values are not allowed here). Check the indentation"),
        ("a: [1, 2", "r.yaml:1: not valid YAML"),
        ("exclude: [*embed*]", "r.yaml:1: not valid YAML"),
        ("a: *x", "Quote text that begins with '*'."),
        ("exclude: [*embed*]", "Quote text that begins with '*'."),
        ("a: 1\n---\nb: 2", "r.yaml:3: not valid YAML (a second document). Keep one document only"),
        ("a: 1\nb: !!python/object/apply:os.system ['ls']", "r.yaml:2: the tag !!python/object/apply:os.system"),
        ("a: !!python/name:os.system", "r.yaml:1: the tag !!python/name:os.system does not fit here"),
        ("a: !!int x", "the tag !!int does not fit here"),
        ("<<: {a: 1}", "r.yaml:1: merge keys (<<) are not supported"),
        ("? [a]\n: 1", "r.yaml:1: a key must be text"),
        ("a: &a [*a]", "r.yaml:1: an alias (*) that contains itself"),
        ("a: " + "[" * 300 + "]" * 300, "nested too deeply; 100 levels are the most"),
        ("a: " + "[" * 5000, "nested too deeply; 100 levels are the most"),
        ("a: 1\nb: \x00", "r.yaml:2: the character '\\x00' may not stand in YAML"),
        ("", "r.yaml: the file is empty"),
        ("# nothing", "r.yaml: the file is empty"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    assert says in refusal(text)


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{after}: &{after} [{','.join([f'*{before}'] * 10)}]\n"
    assert "more than 200000 values once aliases (*) are written out" in refusal(bomb)


def test_files_that_are_none(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match=r"recipes\.yaml: no such file\. Did you mean 'recipe\.yaml'"):
        load(tmp_path / "recipes.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(UsageError, match="not a text file in UTF-8"):
        load(tmp_path / "bytes.yaml")
    with pytest.raises(UsageError, match="larger than 4 MB"):
        load(tmp_path / "large.yaml")


def test_messages_name_the_file_without_its_folders(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1")
    assert load(tmp_path / "recipe.yaml").get("a").where == "recipe.yaml:1"


def test_a_byte_order_mark_is_no_content(tmp_path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert load(tmp_path / "r.yaml").plain() == {"a": 1}


def test_python_data_know_their_path() -> None:
    node = from_data({"merge": [{"ties": {"keep": 20}}]}, "recipe")
    assert node.get("merge").value[0].get("ties").get("keep").where == "recipe: merge[0].ties.keep"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
awkward = st.sampled_from(
    ["no", "1e-4", "null", "~", "", "<<", "*a", "a: b", "- a", "0x1f", ".inf", "2024-01-01", "1:2"]
)
keys = st.text(min_size=1, max_size=5) | awkward
documents = st.recursive(
    scalars | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(documents)
@example({"\x85": "a\u2028b\rc"})
@settings(derandomize=True, deadline=None, max_examples=200)
def test_what_is_dumped_is_read_back(data: object) -> None:
    assert parse(dump({"x": data}), "r.yaml").plain() == {"x": data}
