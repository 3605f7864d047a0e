"""Recipes of small runs: their stages and texts, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.pipelines.cli.app import app

TEXT = Path(__file__).parents[1] / "examples" / "text"
RecipeWriter = Callable[..., Path]  # stages and sections -> recipe file; fixtures `write_recipe` and others


def factorize(**settings: Any) -> dict[str, Any]:
    """Return a factorize stage as a recipe has it."""
    defaults = {"method": "svd_llm", "compression_ratio": 0.3, "num_search_samples": 4, "rank_multiple": 8}
    return {"factorize": defaults | settings}


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Call `ercsvd`; return its exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def modules_of(directory: Path) -> Mapping[str, Storage]:
    """Return how an export's altered modules are stored."""
    config = json.loads((directory / "config.json").read_text())
    return CheckpointConfig.read(config["quantization_config"]).modules
