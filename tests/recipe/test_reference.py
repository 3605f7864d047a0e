"""The published schema and reference are those of the models, and describe every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema

from ercsvd_deploy.recipe.load import recipe_json_schema
from ercsvd_deploy.recipe.reference import (
    REFERENCE_FILE,
    REFERENCE_START,
    SCHEMA_FILE,
    publish,
    recipe_reference,
    recipe_schema_text,
)
from tests.recipe.written import ROOT

REPUBLISH = (
    'run: python -c "from pathlib import Path; '
    'from ercsvd_deploy.recipe.reference import publish; publish(Path())"'
)


def described(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, bool]:
    return {
        name: bool(
            field.get("description") or definitions[field["$ref"].rsplit("/", 1)[1]].get("description")
        )
        for name, field in schema["properties"].items()
    }


def test_the_schema_describes_every_field_and_is_published() -> None:
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    definitions = schema["$defs"]
    for section in (schema, *definitions.values()):
        assert section["additionalProperties"] is False
        assert all(described(section, definitions).values()), section["title"]
    assert (ROOT / SCHEMA_FILE).read_text(encoding="utf-8") == recipe_schema_text(), REPUBLISH


def test_the_reference_is_published_and_names_every_key() -> None:
    published = (ROOT / REFERENCE_FILE).read_text(encoding="utf-8")
    assert published.partition(REFERENCE_START)[2] == f"\n{recipe_reference()}", REPUBLISH
    definitions = recipe_json_schema()["$defs"]
    one_key_stages = {"FactorizeStage", "RecoverStage", "QuantizeStage"}
    keys = {
        key
        for name, section in definitions.items()
        if name not in one_key_stages
        for key in section["properties"]
    }
    assert {key for key in keys if f"| `{key}` |" not in published} == set()


def test_publish_keeps_the_hand_written_head(tmp_path: Path) -> None:
    for file in (SCHEMA_FILE, REFERENCE_FILE):
        (tmp_path / file).parent.mkdir()
    (tmp_path / REFERENCE_FILE).write_text(f"by hand\n\n{REFERENCE_START}old", encoding="utf-8")
    publish(tmp_path)
    publish(tmp_path)
    assert (tmp_path / SCHEMA_FILE).read_text(encoding="utf-8") == recipe_schema_text()
    expected = f"by hand\n\n{REFERENCE_START}\n{recipe_reference()}"
    assert (tmp_path / REFERENCE_FILE).read_text(encoding="utf-8") == expected
