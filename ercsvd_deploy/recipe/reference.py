"""The published documents about recipes: the JSON schema for editors and the reference of every key.

Both are generated from the models in `sections`. A test compares the copies in the repository with the output
of this module; `publish` writes them again. No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ercsvd_deploy.recipe.gates import Gates, ServingParityGate
from ercsvd_deploy.recipe.quantize import Correction, Quantize, QuantizeOverride, VocabularyIntegers
from ercsvd_deploy.recipe.sections import (
    Calibration,
    ConversationFile,
    Evaluation,
    Export,
    HubConversations,
    HubDataset,
    ImageFolder,
    JsonLines,
    LmEval,
    ModelSource,
    ParquetFile,
    Recipe,
    SavedDataset,
    Serving,
    Target,
    TextFile,
    Vision,
    VisualQuestions,
)
from ercsvd_deploy.recipe.stages import Factorize, Recover

SCHEMA_FILE = Path("recipes/recipe.schema.json")
REFERENCE_FILE = Path("docs/recipes.md")
REFERENCE_START = "<!-- generated from the recipe schema: change the descriptions there, not here -->\n"

# Heading -> model, in the order of a recipe.
SECTIONS: dict[str, type[BaseModel]] = {
    "The whole recipe": Recipe,
    "`model`": ModelSource,
    "`calibration`": Calibration,
    "A dataset: `text`": TextFile,
    "A dataset: `jsonl`": JsonLines,
    "A dataset: `parquet`": ParquetFile,
    "A dataset: `saved`": SavedDataset,
    "A dataset: `hub`": HubDataset,
    "`vision`": Vision,
    "A dataset of pictures: `conversations`": ConversationFile,
    "A dataset of pictures: `folder`": ImageFolder,
    "A dataset of pictures: `hub`": HubConversations,
    "Stage `factorize`": Factorize,
    "Stage `recover`": Recover,
    "Stage `quantize`": Quantize,
    "`quantize.correction`": Correction,
    "`quantize.overrides`": QuantizeOverride,
    "`quantize.lm_head` and `quantize.embeddings`": VocabularyIntegers,
    "`target`": Target,
    "`evaluation`": Evaluation,
    "`evaluation.visual_questions`": VisualQuestions,
    "`evaluation.lm_eval`": LmEval,
    "`gates`": Gates,
    "`gates.serving_parity`": ServingParityGate,
    "`serving`": Serving,
    "`export`": Export,
}

# JSON schema's keywords -> words of the tables.
WORDS = {
    "boolean": "true, false",
    "integer": "whole number",
    "null": "null",
    "number": "number",
    "object": "mapping",
    "path": "path",
    "string": "text",
}
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}
TABLE_HEAD = "| key | value | default | meaning |\n|---|---|---|---|\n"


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe.

    It covers each section by itself; only `load_recipe` checks that the sections fit together.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "ercsvd-deploy recipe",
    }


def recipe_schema_text() -> str:
    """Return the contents of the published JSON schema."""
    return json.dumps(recipe_json_schema(), indent=2) + "\n"


def recipe_reference() -> str:
    """Return the reference of every key as Markdown: a table for each section."""
    definitions = recipe_json_schema()["$defs"]
    return "\n".join(_section(heading, model, definitions) for heading, model in SECTIONS.items())


def publish(root: Path) -> None:
    """Write the schema and the reference into a checkout; the reference's hand-written head is kept."""
    (root / SCHEMA_FILE).write_text(recipe_schema_text(), encoding="utf-8")
    reference = root / REFERENCE_FILE
    head, _, _ = reference.read_text(encoding="utf-8").partition(REFERENCE_START)
    reference.write_text(f"{head}{REFERENCE_START}\n{recipe_reference()}", encoding="utf-8")


def _section(heading: str, model: type[BaseModel], definitions: dict[str, Any]) -> str:
    """Return one section's heading, summary and table."""
    schema = recipe_json_schema() if model is Recipe else definitions[model.__name__]
    required = schema.get("required", [])
    rows = []
    for name, field in model.model_fields.items():
        property_schema = schema["properties"][name]
        default = "required" if name in required else f"`{_default(property_schema)}`"
        cells = (f"`{name}`", _values(property_schema), default, field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return f"## {heading}\n\n{schema['description']}\n\n{TABLE_HEAD}{''.join(rows)}"


def _default(schema: dict[str, Any]) -> str:
    """Return a default as it is written in YAML; `{}` for a section."""
    if "$ref" in schema:
        return "{}"
    default = schema.get("default")
    return default if isinstance(default, str) else json.dumps(default)


def _values(schema: dict[str, Any]) -> str:
    """Return the values that a property takes, in words."""
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    members = schema.get("anyOf") or schema.get("oneOf")
    if members:
        return " or ".join(dict.fromkeys(_values(member) for member in members))
    kind = "path" if schema.get("format") == "path" else schema.get("type", "object")
    if kind == "array":
        return f"list of {_values(schema['items'])}"
    bounds = ", ".join(f"{sign} {schema[keyword]}" for keyword, sign in BOUNDS.items() if keyword in schema)
    return f"{WORDS[kind]} {bounds}".strip()
