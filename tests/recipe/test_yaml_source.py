"""Reading YAML: positions and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ercsvd_deploy.recipe.load import RecipeError
from ercsvd_deploy.recipe.yaml_source import MAX_BYTES, read_yaml_file
from tests.recipe.written import Load, load_written, parse


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return load_written(tmp_path_factory.mktemp("recipes") / "r.yaml")


def refusal_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, -2, +3, 1_000, 0x1F, 0]", [1, -2, 3, 1000, 31, 0]),
        ("[1.5, 5e-2, .5, 1., 1.0e+3, -.inf]", [1.5, 0.05, 0.5, 1.0, 1000.0, float("-inf")]),
        ("[true, False, null, ~, '', '4']", [True, False, None, None, "", "4"]),
        ("[010, 0o7, 1:30, 2020-01-01, e5, 1e, .]", ["010", "0o7", "1:30", "2020-01-01", "e5", "1e", "."]),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, expected: list[Any]) -> None:
    read = parse(text).plain()
    assert read == expected
    assert [type(value) for value in read] == [type(value) for value in expected]


def test_values_remember_where_their_key_stands() -> None:
    root = parse("a:\n  b: [x, {c: 1}]\n'd.e': &x {f: 2}\ng: *x\n")
    origins = {
        (): "1:1",
        ("a",): "1:1",
        ("a", "b"): "2:3",
        ("a", "b", 0): "2:7",
        ("a", "b", 1, "c"): "2:11",
        ("a", "b", 1, "absent", "deeper"): "2:10",
        ("a", "b", 9): "2:3",
        ("d.e",): "3:1",
        ("g",): "4:1",
        ("g", "f"): "3:12",
    }
    assert {location: root.origin_of(location) for location in origins} == origins


def test_plain_documents_read_as_pyyaml_reads_them() -> None:
    for text in (
        "a: [1, {b: c}]",
        "{a: null, b: ''}",
        "- |\n  x\n- >-\n  y\n  z",
        "&a [*b]".replace("*b", "1"),
        "",
    ):
        assert parse(text).plain() == yaml.safe_load(text)


def test_merge_keys_give_way_to_explicit_keys_and_earlier_sources() -> None:
    text = "x: &x {a: 1, b: 1, c: 1}\ny: &y {b: 2, c: 2, d: 2}\nz: {c: 3, <<: [*x, *y]}"
    assert parse(text).plain()["z"] == yaml.safe_load(text)["z"] == {"a": 1, "b": 1, "c": 3, "d": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "3:1: key 'a' appears twice in one mapping; remove one"),
        (
            "a: !!python/object/apply:os.system [x]",
            "1:4: tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a: !!binary aGk=", "1:4: tag 'tag:yaml.org,2002:binary' is not allowed"),
        ("a: !!set {x}", "1:4: tag 'tag:yaml.org,2002:set' is not allowed"),
        ("a: !mine x", "1:4: tag '!mine' is not allowed; write plain YAML"),
        ("a: !!int x", "1:4: 'x' is not a value of type int"),
        ("a: !!int ''", "1:4: '' is not a value of type int"),
        ("a: !!bool x", "1:4: 'x' is not a value of type bool"),
        ("? [1]\n: 2", "1:3: a key must be plain text"),
        ("<<: 1", "1:5: a merge key (<<) takes a mapping or a list of mappings"),
        ("a: &a [*a]", "nested deeper than 32 levels, or an alias contains itself"),
        ("a: &a {<<: *a}", "nested deeper than 32 levels, or an alias contains itself"),
        ("a: " + "[" * 100_000, "1:35: values are nested deeper than 32 levels"),
        ("a: " + "- " * 50, "1:"),
        ("[" + "1," * 20_000 + "]", "more than 10000 values"),
        ("a: " + "9" * 5000, "1:4: a number has more than 64 characters"),
        ("a: [1", "1:6: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n\tb: 2", "2:1: while scanning for the next token, found character '\\t'"),
        ("a: 1\nb: \x07", "2:4: character #x0007 is not allowed; remove it"),
        ('a: "\\0"', "1:4: the text has a NUL or half a surrogate pair"),
        ('"\\ud800": 1', "1:1: the text has a NUL or half a surrogate pair"),
        ("a: *b", "1:4: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "2:1: expected a single document in the stream"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_where_it_stands(text: str, expected: str) -> None:
    assert expected in refusal_of(text)


def test_a_yaml_bomb_is_refused_before_it_expands() -> None:
    levels = [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, 12)]
    assert "more than 10000 values" in refusal_of("\n".join(["l0: &l0 [x]", *levels]))
    merges = [f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}" for level in range(1, 12)]
    assert "more than 10000 values" in refusal_of("\n".join(["m0: &m0 {x: 1}", *merges]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "r.yaml:1:1: the recipe is empty; it needs at least model and stages"),
        (b"# only a comment\n", "r.yaml:1:1: the recipe is empty"),
        (b"\xef\xbb\xbf[1]", "r.yaml:1:1: the recipe is [1]; it must be a mapping (key: value)"),
        (b"a: 1\nbc: \xff", "r.yaml:2:5: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1:1: byte 0xff is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "r.yaml:1:1: is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_at_all(load: Load, data: bytes, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(data)
    assert expected in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"cannot be read \(is a directory\); give the path of a recipe file"
    ):
        read_yaml_file(tmp_path)
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read \(no such file or directory\)"):
        read_yaml_file(tmp_path / "gone.yaml")
