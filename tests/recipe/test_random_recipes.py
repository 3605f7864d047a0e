"""Random recipes, texts and overrides: none leads to anything but a recipe or a clear refusal."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ercsvd_deploy.recipe.load import Recipe, RecipeError, canonical, recipe_json_schema
from tests.recipe.written import BASE, Load, load_written, parse

VALIDATOR = jsonschema.Draft202012Validator(recipe_json_schema())


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return load_written(tmp_path_factory.mktemp("recipes") / "r.yaml")


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
