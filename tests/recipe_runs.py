"""Recipes of small runs: their stages and texts, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.pipelines.cli.app import app
from tests.forks import Fork, Forks

TEXT = Path(__file__).parents[1] / "examples" / "text"
FACTORIZE = {"method": "svd_llm", "compression_ratio": 0.3, "num_search_samples": 4}
RecipeWriter = Callable[..., Path]  # stages and sections -> recipe file; fixtures `write_recipe` and others


def recipe_writer(directory: Path, model: Path, texts: Path) -> RecipeWriter:
    """Return a writer of recipes: stages and sections -> recipe file.

    Args:
        directory: Where recipes and what they export go.
        model: The model, unless a recipe has another.
        texts: A folder with `calibration.txt` and `in_domain.txt`.
    """

    def write(*stages: dict[str, Any], **sections: Any) -> Path:
        recipe = {
            "model": {"path": str(model)},
            "calibration": {
                "dataset": {"text": str(texts / "calibration.txt")},
                "num_samples": 12,
                "sequence_length": 48,
            },
            "stages": list(stages) or [{"factorize": FACTORIZE | {"method": "erc_svd"}}],
            "evaluation": {"perplexity": {"held_out": str(texts / "in_domain.txt")}, "max_sequences": 4},
            "export": {"path": str(directory / "out")},
        }
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | sections))
        return path

    return write


def factorize(**settings: Any) -> dict[str, Any]:
    """Return a factorize stage as a recipe has it."""
    return {"factorize": FACTORIZE | {"rank_multiple": 8} | settings}


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Call `ercsvd`; return its exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def start(
    *arguments: object,
    memory: int | None = None,
    directory: Path | None = None,
    module: str = "ercsvd_deploy",
) -> Fork:
    """Start `ercsvd` in a process of its own.

    Args:
        arguments: Its command line.
        memory: Bytes of addresses that it may have.
        directory: The directory that it starts in; this process's if none is given.
        module: What is run as the command.
    """
    return _forks().start(module, *arguments, memory=memory, directory=directory)


def run(*arguments: object) -> tuple[int, str, str]:
    """Do as `invoke` in a process of its own, where what the command starts is a fork, too."""
    started = start(*arguments)
    output, errors = started.communicate(timeout=400)
    return started.wait(0), output, errors


@cache
def _forks() -> Forks:
    return Forks("tests.quick_commands")


def modules_of(directory: Path) -> Mapping[str, Storage]:
    """Return how an export's altered modules are stored."""
    config = json.loads((directory / "config.json").read_text())
    return CheckpointConfig.read(config["quantization_config"]).modules
