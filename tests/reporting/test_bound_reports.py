"""A report belongs to the weights beside it: another one's, or a changed one, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ercsvd_deploy.format.files.manifest import REPORT_SUMS_FILE, weights_digest
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.stages.export import REPORT_FILE
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter, factorize, invoke

pytestmark = [pytest.mark.slow, pytest.mark.draws]  # whole runs

GATES = {"max_size_ratio": 1.0, "built_in_text": False}


@pytest.fixture
def export(write_recipe: RecipeWriter) -> Path:
    _, directory = run_recipe(load_recipe(write_recipe(factorize(num_compressed_layers="all"), gates=GATES)))
    return directory


@pytest.fixture
def other(write_recipe: RecipeWriter, tmp_path: Path) -> Path:
    """An export of the same model and recipe, but smaller."""
    stage = factorize(num_compressed_layers="all", compression_ratio=0.6)
    recipe = load_recipe(write_recipe(stage, gates=GATES), output=tmp_path / "smaller")
    _, directory = run_recipe(recipe)
    return directory


def test_report_and_weights_name_each_other(export: Path) -> None:
    report = json.loads((export / REPORT_FILE).read_text())
    assert report["weights_sha256"] == weights_digest(export)
    assert REPORT_FILE in (export / REPORT_SUMS_FILE).read_text()
    assert invoke("check", export)[0] == 0
    assert invoke("verify", export)[0] == 0


def swap(export: Path, other: Path) -> None:
    shutil.copyfile(other / REPORT_FILE, export / REPORT_FILE)


def swap_with_sums(export: Path, other: Path) -> None:
    swap(export, other)
    shutil.copyfile(other / REPORT_SUMS_FILE, export / REPORT_SUMS_FILE)


def flatter(export: Path, _other: Path) -> None:
    report = json.loads((export / REPORT_FILE).read_text())
    report["compressed"]["num_bytes"] //= 2
    (export / REPORT_FILE).write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "was changed after the run"),
        (swap_with_sums, "is about other weights"),
        (flatter, "was changed after the run"),
    ],
)
def test_another_report_is_refused(
    change: Callable[[Path, Path], None], said: str, export: Path, other: Path
) -> None:
    change(export, other)
    for command in ("check", "verify"):
        code, _, complaint = invoke(command, export)
        assert (code, said in complaint) == (1, True), command
        assert "Traceback" not in complaint


def test_a_report_from_before_there_were_digests_is_believed(export: Path) -> None:
    report = json.loads((export / REPORT_FILE).read_text())
    del report["weights_sha256"]
    (export / REPORT_FILE).write_text(json.dumps(report))
    (export / REPORT_SUMS_FILE).unlink()
    assert invoke("check", export)[0] == 0
    assert invoke("verify", export)[0] == 0


def test_the_page_may_be_made_again(export: Path) -> None:
    assert invoke("report", export)[0] == 0
    assert invoke("verify", export)[0] == 0
