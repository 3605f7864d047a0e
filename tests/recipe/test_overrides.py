"""Overrides: what they change, and how wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ercsvd_deploy.recipe.load import RecipeError, canonical
from ercsvd_deploy.recipe.overrides import parse_override, with_override
from tests.recipe.written import BASE, Load, load_written, parse


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return load_written(tmp_path_factory.mktemp("recipes") / "r.yaml")


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


RECOVERED_TWICE = BASE | {"stages": [BASE["stages"][0], {"recover": {}}, {"quantize": {}}, {"recover": {}}]}


@pytest.mark.parametrize(
    ("by_name", "by_place"),
    [
        ("factorize.compression_ratio=0.4", "stages.0.factorize.compression_ratio=0.4"),
        ("quantize.bits=8", "stages.1.quantize.bits=8"),
        ('quantize.overrides."mlp.*".bits=8', 'stages.1.quantize.overrides."mlp.*".bits=8'),
        ("quantize={method: rtn}", "stages.1.quantize={method: rtn}"),
        ("quantize=null", "stages.1=null"),
        ("quantize.bits=null", "stages.1.quantize.bits=null"),
    ],
)
def test_a_stage_is_addressed_by_its_name(load: Load, by_name: str, by_place: str) -> None:
    raw = BASE | {"stages": [BASE["stages"][0], {"quantize": {"bits": 4}}]}
    recipe = load(yaml.safe_dump(raw), by_name)
    assert recipe == load(yaml.safe_dump(raw), by_place)
    if by_name != "quantize.bits=null":  # null makes the default hold, which is 4
        assert recipe != load(yaml.safe_dump(raw))


def test_names_hold_when_an_override_has_moved_the_stages(load: Load) -> None:
    raw = RECOVERED_TWICE | {"stages": RECOVERED_TWICE["stages"][:3]}
    recipe = load(yaml.safe_dump(raw), "recover=null", "quantize.bits=8")
    assert recipe.recover is None
    assert recipe.quantize is not None
    assert recipe.quantize.bits == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "recover.steps=3",
            "--set recover.steps=3: the recipe has 2 stages 'recover': stages.1.recover and stages.3.recover",
        ),
        ("recover=null", "the recipe has 2 stages 'recover'"),
        ("bits=8", "'bits' is no field of the recipe; did you mean 'quantize.bits'?"),
        (
            "method=rtn",
            "'method' is no field of the recipe; did you mean 'factorize.method' or 'quantize.method'?",
        ),
        ("quantise.bits=8", "did you mean 'quantize.bits'?"),
        ("quantize.bts=8", "field 'stages.2.quantize.bts' is unknown (value 8); did you mean 'bits'?"),
        (
            "factorize.compression_ratio=2",
            "--set factorize.compression_ratio=2: field 'stages.0.factorize.comp",
        ),
        ("quantise\n.bits=8", "did you mean 'quantize.bits'?"),
    ],
)
def test_an_unclear_stage_is_refused_with_the_candidates(load: Load, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(yaml.safe_dump(RECOVERED_TWICE), override)
    assert expected in str(caught.value)
    assert "\n" not in caught.value.problems[0]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (BASE["stages"], "its stages: 'factorize' (stages.0); stages.1.quantize adds one"),
        ([{"fac\ntorise": {}}], r"its stages: 'fac\ntorise' (stages.0)"),
        ([], "its stages: none; stages.0.quantize adds one"),
        ("text", "its stages: none"),
        ([1, ["factorize"], None], "its stages: none"),
    ],
)
def test_a_stage_that_is_not_there_is_refused(load: Load, stages: Any, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(yaml.safe_dump(BASE | {"stages": stages}), "quantize.bits=8")
    assert f"the recipe has no stage 'quantize'; {expected}" in str(caught.value)
    assert "\n" not in caught.value.problems[0]
