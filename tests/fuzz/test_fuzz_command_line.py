"""Fuzz: damaged files through the command line end in an exit code and one message, never in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from ercsvd_deploy.format.files.manifest import MANIFEST_FILE, write_manifest
from ercsvd_deploy.format.files.tensor_store import SINGLE_FILE
from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from tests.conftest import ModelDirectory
from tests.fuzz.smallest_report import REPORT
from tests.fuzz.strategies import FuzzLog, as_json, cases, damaged_bytes, damaged_values, listing

TEXT = Path(__file__).parents[2] / "examples" / "text" / "in_domain.txt"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory, low_rank_model: ModelDirectory
) -> Path:
    """A folder with a recipe, its model, and a finished export."""
    folder = tmp_path_factory.mktemp("fuzz-commands")
    shutil.copytree(tiny_model("llama"), folder / "model")
    shutil.copytree(low_rank_model("llama"), folder / "export")
    (folder / "export" / REPORT_FILE).write_bytes(as_json(REPORT))
    write_manifest(folder / "export", unlisted=frozenset({REPORT_FILE}))
    recipe = {
        "model": {"path": str(folder / "model")},
        "calibration": {"dataset": {"text": str(TEXT)}, "num_samples": 32, "sequence_length": 16},
        "stages": [
            {"factorize": {"method": "svd", "compression_ratio": 0.3, "num_compressed_layers": "all"}}
        ],
        "export": {"path": str(folder / "out")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


# Command and file that it reads; a recipe and everything below `model` may be judged wrong by either code.
COMMANDS = [
    ("validate", "recipe.yaml", "recipe.yaml"),
    ("plan", "recipe.yaml", "recipe.yaml"),
    ("plan", "recipe.yaml", "model/config.json"),
    ("run", "recipe.yaml", f"model/{SINGLE_FILE}"),
    ("run", "recipe.yaml", "model/tokenizer.json"),
    ("check", "export", f"export/{REPORT_FILE}"),
    ("verify", "export", f"export/{MANIFEST_FILE}"),
    ("verify", "export", f"export/{SINGLE_FILE}"),
    ("status", "export", "export/config.json"),
    ("eval", "export", "export/config.json"),
    ("eval", "export", f"export/{SINGLE_FILE}"),
]


def invoke(command: str, argument: Path) -> Result:
    options = ["--text", str(TEXT), "--sequence-length", "32", "--max-sequences", "1"]
    return CliRunner().invoke(app, [command, str(argument), *(options if command == "eval" else [])])


def test_without_damage_every_command_works(place: Path) -> None:
    for command, argument, _ in COMMANDS:
        result = invoke(command, place / argument)
        assert result.exit_code == (3 if command == "check" else 0), result.stderr
    shutil.rmtree(place / "out")


@pytest.mark.slow
@cases(120)
@given(data=st.data())
def test_damage_ends_in_an_exit_code_and_a_message(
    data: st.DataObject, place: Path, fuzz_log: FuzzLog
) -> None:
    command, argument, name = data.draw(st.sampled_from(COMMANDS))
    whole = (place / name).read_bytes()
    damage = damaged_bytes(whole)
    if name.endswith(".json"):
        damage = damage | damaged_values(json.loads(whole)).map(as_json)
    (place / name).write_bytes(data.draw(damage))
    before = listing(place)
    try:
        result = invoke(command, place / argument)
        written = {path for path, seen in listing(place).items() if before.get(path) != seen}
    finally:
        (place / name).write_bytes(whole)
        shutil.rmtree(place / "out", ignore_errors=True)
    area = f"ercsvd {command}"
    if result.exit_code in (0, 3):  # the damage changed nothing that this command reads, or only a verdict
        fuzz_log.accepted[area] += 1
    else:
        assert result.exit_code in (1, 2), result.stderr
        assert result.stderr.startswith("error: ")
        fuzz_log.refuse(area, result.stderr)
    assert "Traceback" not in result.output
    assert "should have had a better message" not in result.output, result.output
    assert all(path.split("/")[0] == "out" for path in written), written
