"""A natural recipe, which names no ranks, is planned for public models, in little memory and time."""

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
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": 256,
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
    asked = [
        {"config": config, "sizes": [1, 2] if name == "Qwen2.5-1.5B" else [1, 2, 4]}
        for name, config in PUBLIC_MODELS.items()
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        input="".join(json.dumps(each) + "\n" for each in asked),
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    return dict(zip(PUBLIC_MODELS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_plan_is_small_and_quick(name: str, answers: Mapping[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert answer["refused"] is None
    assert answer["peak_bytes"] < MOST_BYTES
    assert answer["seconds"] < MOST_SECONDS
    assert answer["parameters"] > 10**8


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_natural_recipe_is_planned(name: str, answers: Mapping[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert answer["refused"] is None
    assert answer["problems"] == []
    assert answer["kept_parameters"]
    assert all(5 * kept <= 4 * answer["linear_parameters"] for kept in answer["kept_parameters"])
    assert answer["ranks"]
    assert [each for each in answer["ranks"] if each[1] % (128 if each[0] >= 768 else 64)] == []
    assert not any("no multiple" in warning for warning in answer["warnings"])
