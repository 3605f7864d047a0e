"""A plan takes little memory and time, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.planning.public_configs import PUBLIC_MODELS
from tests.recipe_runs import TEXT

MOST_BYTES = 1_500_000_000
MOST_SECONDS = 15  # of a processor; importing the libraries before takes five
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    """Every config's answer, from a process of their own."""
    directory = tmp_path_factory.mktemp("plans")
    model = directory / "model"
    model.mkdir()
    recipe = {
        "model": {"path": str(model)},
        "calibration": {
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": 64,
            "sequence_length": 512,
        },
        "stages": [
            {"factorize": {"method": "erc_svd", "compression_ratio": 0.2}},
            {"quantize": {"bits": 4, "group_size": 64}},
        ],
        "export": {"path": str(directory / "out")},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tests.planning.plan_configs", str(directory / "recipe.yaml")]
    configs = "".join(json.dumps(config) + "\n" for config in PUBLIC_MODELS.values())
    done = subprocess.run(
        command, cwd=REPOSITORY, input=configs, capture_output=True, text=True, timeout=500, check=True
    )
    return dict(zip(PUBLIC_MODELS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_plan_is_small_and_quick(name: str, answers: Mapping[str, dict[str, Any]]) -> None:
    assert answers[name]["peak_bytes"] < MOST_BYTES
    assert answers[name]["seconds"] < MOST_SECONDS
    assert answers[name]["refused"] is None
    assert answers[name]["parameters"] > 10**8
