"""What the command line imports where it computes nothing: no numerical library, nothing that draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ercsvd_deploy.pipelines.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "vllm", "jinja2", "numpy", "scipy", "safetensors", "PIL")
# Runs one command line after the other, and says what they ended with and what was imported by then.
SCRIPT = """
import json, sys
from ercsvd_deploy.pipelines.cli.entry_point import main
ended = []
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as error:
        ended.append(error.code)
print("\\n" + json.dumps([ended, sorted(sys.modules)]))
"""


def modules_after(*command_lines: list[str]) -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(command_lines)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    exit_codes, modules = json.loads(ran.stdout.splitlines()[-1])
    assert exit_codes == [0] * len(command_lines), ran.stderr
    return set(modules)


def test_version_and_help_import_no_recipe_either() -> None:
    commands = [*COMMANDS, "schema", "version"]
    modules = modules_after(["--version"], ["version"], ["--help"], *([name, "--help"] for name in commands))
    assert not modules.intersection([*HEAVY, "yaml", "ercsvd_deploy.recipe.load"])


@pytest.mark.parametrize(
    "arguments",
    [["validate", "recipes/demo.yaml"], ["schema"], ["status", "out/nothing"], ["clean", "out/nothing"]],
    ids=lambda arguments: arguments[0],
)
def test_what_computes_nothing_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not modules_after(arguments).intersection(HEAVY)


@pytest.mark.slow
def test_the_counting_would_notice() -> None:
    assert "torch" in modules_after(["plan", "recipes/demo-lowrank.yaml", "--quiet"])


def test_status_of_an_export_imports_nothing_heavy(tmp_path: Path) -> None:
    description = {"quant_method": "ercsvd", "format_version": 1, "modules": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"quantization_config": description}))
    assert not modules_after(["status", str(tmp_path / "out")]).intersection(HEAVY)


def test_version_is_printed_by_both_ways() -> None:
    for arguments in (["--version"], ["version"]):
        command = [sys.executable, "-m", "ercsvd_deploy", *arguments]
        assert subprocess.check_output(command, text=True, cwd=ROOT).startswith("ercsvd-deploy ")
