"""Recipes in files, for tests of reading them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.recipe.load import Recipe, RecipeError, check_files, load_recipe
from ercsvd_deploy.recipe.yaml_source import Node, parse_yaml

ROOT = Path(__file__).parents[2]
MINIMAL = """\
model: {path: some/model}
calibration: {dataset: {text: text.txt}}
stages:
  - factorize: {method: erc_svd, compression_ratio: 0.2}
"""
VISION = """\
model: {path: some/model}
calibration: {num_samples: 8, sequence_length: 64}
vision: {calibration: {conversations: pictures.jsonl}}
stages:
  - factorize: {method: erc_svd, compression_ratio: 0.2, num_search_samples: 4}
"""
BASE: dict[str, Any] = {
    "model": {"path": "m"},
    "calibration": {"dataset": {"text": "t"}, "num_samples": 32},
    "stages": [{"factorize": {"method": "erc_svd", "compression_ratio": 0.2}}],
}
Load = Callable[..., Recipe]


def written(tmp_path: Path, text: str) -> Path:
    """Write a recipe; return its path."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    """Return the problems of a recipe that must be refused, without the file's directory."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


def load_written(path: Path) -> Load:
    """Return a function that writes a recipe to `path` and loads it."""

    def load_text(text: str | bytes, *overrides: str, output: Path | None = None) -> Recipe:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return load_recipe(path, overrides, output)

    return load_text


def parse(text: str) -> Node:
    """Parse YAML; origins are `line:column`."""
    return parse_yaml(text, lambda line, column: f"{line}:{column}")


def missing_files(recipe: Recipe) -> str:
    """Return the message about the missing files of a recipe."""
    with pytest.raises(RecipeError) as caught:
        check_files(recipe)
    return str(caught.value)
