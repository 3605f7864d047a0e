"""Reading YAML and overrides: positions, limits, and that no text leads to anything but a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ercsvd_deploy.recipe.load import Recipe, RecipeError, canonical, load_recipe, recipe_json_schema
from ercsvd_deploy.recipe.overrides import parse_override, with_override
from ercsvd_deploy.recipe.yaml_source import MAX_BYTES, Node, parse_yaml, read_yaml_file

VALIDATOR = jsonschema.Draft202012Validator(recipe_json_schema())
BASE = {
    "model": {"path": "m"},
    "calibration": {"dataset": {"text": "t"}, "num_samples": 32},
    "stages": [{"factorize": {"method": "erc_svd", "compression_ratio": 0.2}}],
}
Load = Callable[..., Recipe]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    path = tmp_path_factory.mktemp("recipes") / "r.yaml"

    def load_text(text: str | bytes, *overrides: str, output: Path | None = None) -> Recipe:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return load_recipe(path, overrides, output)

    return load_text


def parse(text: str) -> Node:
    return parse_yaml(text, lambda line, column: f"{line}:{column}")


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


def overridden(value: Any, *texts: str) -> Any:
    root = parse(yaml.safe_dump(value))
    for text in texts:
        root = with_override(root, *parse_override(text))
    return root.plain()


@pytest.mark.parametrize(
    ("value", "override", "expected"),
    [
        ({"a": {"b": 1}}, "a.b=2", {"a": {"b": 2}}),
        ({"a": {"b": 1}}, "a.c={d: [1]}", {"a": {"b": 1, "c": {"d": [1]}}}),
        ({"a": None}, "a.b.c=x=y", {"a": {"b": {"c": "x=y"}}}),
        ({"a": [1, 2]}, "a.1=3", {"a": [1, 3]}),
        ({"a": [1, 2]}, "a.2=3", {"a": [1, 2, 3]}),
        ({"a": [1, 2]}, "a.0=null", {"a": [2]}),
        ({"a": [{"b": 1}]}, "a.0.b=", {"a": [{}]}),
        ({}, "a.0.b=1", {"a": [{"b": 1}]}),
        ({"a": {"b": 1, "c": 2}}, "a.b=~", {"a": {"c": 2}}),
        ({"a": {}}, "a.b=null", {"a": {"b": None}}),
        ({"o": {"*.x": {"bits": 4}}}, 'o."*.x".bits=8', {"o": {"*.x": {"bits": 8}}}),
    ],
)
def test_an_override_replaces_adds_or_removes(value: Any, override: str, expected: Any) -> None:
    assert overridden(value, override) == expected
    assert overridden(value, override, override.partition("=")[0] + "=7") != expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("", "--set : is not PATH=VALUE; write it like"),
        ("a.b", "--set a.b: is not PATH=VALUE"),
        ("a..b=1", "--set a..b=1: is not PATH=VALUE"),
        ('a."b=1', "is not PATH=VALUE"),
        (
            "model.path.x=1",
            "--set model.path.x=1: field 'model.path' is 'm', which has no entry 'x'; set it as a",
        ),
        ("stages.2.quantize.bits=4", "field 'stages' is a list; '2' must be a number from 0 to 1"),
        ("stages.x=4", "field 'stages' is a list; 'x' must be a number from 0 to 1"),
        (f"stages.{'9' * 5000}=4", "must be a number from 0 to 1"),
        ("model.path=[1", "--set model.path=[1: while parsing a flow sequence"),
        ("model.path=!!python/name:os.system", "is not allowed; write plain YAML"),
        ("model.path=\n\x00", "--set 'model.path=\\n\\x00': character #x0000 is not allowed"),
        (
            "modle.path=x",
            "--set modle.path=x: field 'modle' is unknown (value {'path': 'x'}); did you mean 'model'?",
        ),
        (
            "stages.0.factorize.bta=0.1",
            "--set stages.0.factorize.bta=0.1: field 'stages.0.factorize.bta' is unknown",
        ),
        ("stages.0.factorize.bta=null", "did you mean 'beta'?"),
        ("stages.0.factorise.beta=0.1", "did you mean 'factorize'?"),
        ("calibration.dataset.hub=x", "has text and hub; a dataset has exactly one of"),
        ("evaluation.lm_eval.task=[a]", "did you mean 'tasks'?"),
        ("model=null", "r.yaml:1:1: field 'model' is missing; add it: The model to compress."),
        ("stages.0=null", "field 'stages' is []; it must be a list with at least 1 entry"),
    ],
)
def test_a_wrong_override_is_refused_by_its_name(load: Load, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(yaml.safe_dump(BASE), override)
    assert expected in str(caught.value)
    assert "\n" not in caught.value.problems[0]


def test_overrides_apply_in_order_and_output_comes_last(load: Load) -> None:
    recipe = load(
        yaml.safe_dump(BASE),
        "stages.0.factorize.compression_ratio=0.3",
        "stages.0.factorize.compression_ratio=0.4",
        "stages.1.quantize.group_size=64",
        "export.path=elsewhere",
        "calibration.seed=null",  # absent already: its default holds all the same
        output=Path("out/here"),
    )
    assert recipe.factorize is not None
    assert recipe.factorize.compression_ratio == 0.4
    assert recipe.quantize is not None
    assert recipe.quantize.group_size == 64
    assert recipe.export.path == Path("out/here")
    assert recipe.calibration is not None
    assert recipe.calibration.seed == 3


def test_another_method_can_be_chosen_by_removing_what_only_the_first_reads(load: Load) -> None:
    text = yaml.safe_dump(BASE).replace("erc_svd", "erc_svd\n    beta: 0.1")
    with pytest.raises(RecipeError, match=r"--set stages\.0\.factorize\.beta=null"):
        load(text, "stages.0.factorize.method=svd_llm")
    recipe = load(text, "stages.0.factorize.method=svd_llm", "stages.0.factorize.beta=null")
    assert "beta" not in canonical(recipe)["stages"][0]["factorize"]


names = st.text("abcdefgh._-*", min_size=1, max_size=8)
counts = st.integers(1, 10_000)
shares = st.floats(0.01, 0.9)
texts = st.one_of(
    st.fixed_dictionaries({"text": names}),
    st.fixed_dictionaries({"jsonl": names}, optional={"field": names}),
    st.fixed_dictionaries(
        {"hub": names}, optional={"config": st.none() | names, "split": names, "field": names}
    ),
)
quantizations = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([4, 8]),
        "group_size": st.sampled_from([32, 64, 128, -1]),
        "sym": st.booleans(),
    },
)
factorizations = st.sampled_from(["svd", "asvd", "svd_llm", "erc_svd"]).flatmap(
    lambda method: st.fixed_dictionaries(
        {"method": st.just(method), "compression_ratio": shares},
        optional={
            "num_compressed_layers": st.sampled_from(["auto", "all"]) | counts,
            "rank_multiple": counts,
            "num_search_samples": st.integers(1, 16),
            **({"beta": st.floats(0, 0.09)} if method == "erc_svd" else {}),
            **({"residual_space": st.sampled_from(["weight", "whitened"])} if method == "erc_svd" else {}),
            **({"activation_exponent": shares} if method == "asvd" else {}),
            **({"compressed_prefix_inputs": st.booleans()} if method in ("svd_llm", "erc_svd") else {}),
        },
    )
)
quantize_stages = st.builds(
    lambda base, rest: {**base, **rest},
    quantizations,
    st.fixed_dictionaries(
        {},
        optional={
            "damping": shares,
            "mse": st.booleans(),
            "ignore": st.lists(names, unique=True, max_size=3),
            "overrides": st.dictionaries(names, quantizations.filter(bool), max_size=3),
        },
    ),
)
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"path": names}, optional={"dtype": st.sampled_from(["auto", "float16"])}
        ),
        "calibration": st.fixed_dictionaries(
            {"dataset": texts}, optional={"num_samples": st.integers(16, 999)}
        ),
        "stages": st.one_of(
            factorizations.map(lambda options: [{"factorize": options}]),
            quantize_stages.map(lambda options: [{"quantize": options}]),
            st.tuples(factorizations, quantize_stages).map(
                lambda two: [{"factorize": two[0]}, {"quantize": two[1]}]
            ),
        ),
    },
    optional={
        "evaluation": st.fixed_dictionaries(
            {},
            optional={
                "perplexity": st.dictionaries(
                    st.from_regex(r"[a-z][a-z0-9_.-]{0,5}", fullmatch=True), names | texts
                ),
                "max_sequences": st.none() | counts,
                "lm_eval": st.fixed_dictionaries({"tasks": st.lists(names, min_size=1, unique=True)}),
            },
        ),
        "serving": st.fixed_dictionaries(
            {"tensor_parallel_sizes": st.lists(counts, min_size=1, unique=True)}
        ),
        "export": st.fixed_dictionaries({}, optional={"path": names, "max_shard_size": st.just("2.5GB")}),
    },
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(recipes)
def test_a_valid_recipe_survives_a_round_trip(load: Load, raw: dict[str, Any]) -> None:
    recipe = load(yaml.safe_dump(raw))
    VALIDATOR.validate(raw)
    again = canonical(recipe)
    VALIDATOR.validate(again)
    assert load(yaml.safe_dump(again)) == recipe
    assert canonical(load(yaml.safe_dump(again))) == again


scalars = st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=5)
words = st.sampled_from(
    ["erc_svd", "auto", "text", "factorize", "beta", "TextFile", "Recipe", "[key]", "{field}"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | words, inner),
)


def mutated(data: st.DataObject, value: Any) -> Any:
    """Replace, add or remove one value somewhere inside."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from([*value, "new"]))
        if key == "new":
            return {**value, data.draw(st.text(max_size=6) | words): data.draw(values)}
        if not data.draw(st.integers(0, 3)):
            return {other: child for other, child in value.items() if other != key}
        return {**value, key: mutated(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutated(data, value[index]), *value[index + 1 :]]
    return data.draw(values)


def outcome(load: Load, text: str, *overrides: str) -> Recipe | RecipeError:
    """Return the recipe or its refusal; any other exception fails the test."""
    try:
        return load(text, *overrides)
    except RecipeError as error:
        return error


@settings(max_examples=400, deadline=None, derandomize=True)
@given(recipes, st.data())
def test_a_mutated_recipe_is_refused_or_conforms_to_the_schema(
    load: Load, raw: dict[str, Any], data: st.DataObject
) -> None:
    text = yaml.safe_dump(mutated(data, raw))
    result = outcome(load, text)
    if isinstance(result, RecipeError):
        assert all("r.yaml:" in problem and "\n" not in problem for problem in result.problems)
    else:
        VALIDATOR.validate(parse(text).plain())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text("ab1:{}[],&*!?|>-#%@'\"\\ \n\t<~.0x", max_size=60)
    | st.binary(max_size=40).map(lambda data: data.decode("latin1"))
)
def test_no_text_breaks_the_reader(load: Load, text: str) -> None:
    with pytest.raises(RecipeError):
        load(text)


path_parts = st.sampled_from(
    ["model", "stages", "0", "1", "factorize", "quantize", "beta", '"a.b"', "overrides", "path"]
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(path_parts | st.text(max_size=4), max_size=5), st.text(max_size=10) | scalars.map(str) | words
)
def test_no_override_breaks_the_loader(load: Load, path: list[str], value: str) -> None:
    result = outcome(load, yaml.safe_dump(BASE), f"{'.'.join(path)}={value}")
    assert isinstance(result, Recipe) or result.problems
