"""What the tests of families have found is in the README, and in the plans of models of other types."""

from __future__ import annotations

from ercsvd_deploy.models.description.tested_families import family_warnings, read_results
from tests.families import tiny_families, tiny_vision_families
from tests.families.table import README, with_tables


def test_the_readme_has_the_tables_of_what_was_found() -> None:
    assert README.read_text() == with_tables(README.read_text())


def test_every_family_has_been_served() -> None:
    assert sorted(read_results()) == sorted([*tiny_families.FAMILIES, *tiny_vision_families.FAMILIES])


def test_doubts_are_told_of_types_that_nobody_has_served() -> None:
    assert family_warnings("llama") == family_warnings("phi3") == family_warnings("llava") == []
    [doubt] = family_warnings("apertus")
    assert "models of type apertus: vLLM does not run the original" in doubt
    [doubt] = family_warnings("xglm")
    assert "no test has served a compressed model of type xglm with vLLM" in doubt
