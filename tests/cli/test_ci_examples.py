"""Every `ercsvd` command in the documentation and the CI examples is one that exists, with its options."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from ercsvd_deploy.pipelines.cli.app import app
from tests.fork_command import fork_command
from tests.forks import Fork
from tests.recipe_runs import start

ROOT = Path(__file__).parents[2]
EXAMPLES = (ROOT / "docs" / "ci" / "github.yml", ROOT / "docs" / "ci" / "gitlab.yml")
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *EXAMPLES)
_IN_TICKS = re.compile(r"`(ercsvd [^`]+)`")
# A line's own command: in a block, after `run:` or a list's dash. A comment behind it does not belong to it.
_ON_A_LINE = re.compile(r"^\s*(?:- )?(?:run: )?(ercsvd\s.+)$")


def commands_in(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _ON_A_LINE.match(line):
            yield match[1]
        else:
            yield from _IN_TICKS.findall(line)


ALL = [
    pytest.param(command, id=f"{path.relative_to(ROOT)}: {command}")
    for path in DOCUMENTS
    for command in commands_in(path)
]


def words_of(command: str) -> list[str]:
    """Return a command's words, without what the shell does with its result."""
    text = re.split(r"\s(?:#|\|\||&&|>|\|)|;", command)[0]
    return shlex.split(text)[1:]


def problems_of(command: str) -> list[str]:
    """Say what is wrong with a command line; a command alone, as in running text, needs no arguments."""
    name, *arguments = words_of(command)
    known = typer.main.get_command(app)
    commands: dict[str, Any] = known.commands  # type: ignore[attr-defined]
    if name == "--help":
        return []
    if name not in commands:
        return [f"no command {name}"]
    found = commands[name]
    if not arguments:
        return []
    context = found.make_context(name, arguments, resilient_parsing=False)
    return [] if context.params else [f"{name} took none of {arguments}"]


@pytest.mark.parametrize("command", ALL)
def test_the_command_exists_with_its_options(command: str) -> None:
    assert problems_of(command) == []


def test_every_command_is_documented() -> None:
    names = {words_of(command)[0] for path in DOCUMENTS for command in commands_in(path)}
    assert names >= typer.main.get_command(app).commands.keys()  # type: ignore[attr-defined]


def test_commands_are_found_wherever_they_stand() -> None:
    for path in EXAMPLES:
        names = {words_of(command)[0] for command in commands_in(path)}
        assert names >= {"validate", "plan", "run", "verify"}, path
    in_guide = {words_of(command)[0] for command in commands_in(ROOT / "docs" / "ci" / "README.md")}
    assert in_guide >= {"validate", "plan", "run", "check", "verify"}


@pytest.mark.parametrize(
    "command", ["ercsvd frobnicate x", "ercsvd plan x.yaml --jsn", "ercsvd check", "ercsvd plan a b"]
)
def test_wrong_commands_are_noticed(command: str) -> None:
    if command == "ercsvd check":
        command += " --json"  # which lacks the directory
    try:
        problems = problems_of(command)
    except Exception as error:  # noqa: BLE001 - click's usage errors, whichever copy of click raises them
        problems = [str(error)]
    assert problems


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_yaml_that_plans_always_and_judges_on_demand(path: Path) -> None:
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "github.yml":
        # YAML 1.1 reads the key `on` as true; GitHub does not.
        assert set(parsed[True]) == {"push", "pull_request", "workflow_dispatch"}
        jobs = parsed["jobs"]
        scripts = {name: str([step.get("run", "") for step in job["steps"]]) for name, job in jobs.items()}
        assert jobs["gates"]["if"] == "github.event_name == 'workflow_dispatch'"
        assert "${{" not in "".join(scripts.values())  # what people type never becomes part of a script
        assert all(job["timeout-minutes"] for job in jobs.values())
        kept = str(jobs["gates"]["steps"][-1]["with"])
    else:
        scripts = {name: str(parsed[name]["script"]) for name in ("plan", "gates")}
        assert parsed["gates"]["when"] == "manual"
        assert parsed["gates"]["allow_failure"] == {"exit_codes": 3}
        kept = str(parsed["gates"]["artifacts"])
    assert "ercsvd validate" in scripts["plan"]
    assert "ercsvd plan" in scripts["plan"]
    assert "ercsvd run" not in scripts["plan"]
    assert "--junit gates.xml" in scripts["gates"]
    assert "gates.xml" in kept


def plan_script(path: Path) -> str:
    """Return what a template runs on every change, without its installations."""
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "github.yml":
        lines = [step["run"] for step in parsed["jobs"]["plan"]["steps"] if "run" in step]
    else:
        lines = parsed["plan"]["script"]
    installs = [line for line in lines if line.startswith("pip install")]
    assert any("ercsvd_deploy-*.whl" in line for line in installs)
    return "\n".join(line for line in lines if line not in installs)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_plans_of_a_template_are_green_on_a_small_runner(path: Path, tmp_path: Path) -> None:
    """Two cores, no GPU, no vLLM, little memory: as its own script runs it, on this repository's recipes."""
    (tmp_path / "recipes").mkdir()
    for name in ("demo", "demo-lowrank", "demo-llava"):
        shutil.copy(ROOT / "recipes" / f"{name}.yaml", tmp_path / "recipes")
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    def start_command(arguments: list[str], directory: Path) -> Fork:
        addresses = 8_000_000_000  # of which libraries reserve more than they use
        return start(*arguments, memory=addresses, directory=directory, module="tests.cli.without_vllm")

    def run_script() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        command = ["bash", "-e", "-c", plan_script(path)]
        with fork_command(tools / "ercsvd", start_command, timeout=200):
            return subprocess.run(
                command,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )

    tools = tmp_path / "bin"
    tools.mkdir()
    done = run_script()
    assert done.returncode == 0, done.stdout + done.stderr
    plans = [json.loads(plan.read_text()) for plan in (tmp_path / "plans").glob("*.json")]
    assert len(plans) == 3
    assert all(plan["candidates"] for plan in plans)
    # The same script is red where a recipe cannot work.
    text = (tmp_path / "recipes" / "demo-lowrank.yaml").read_text()
    (tmp_path / "recipes" / "demo-lowrank.yaml").write_text(text.replace("ratio: 0.2", "ratio: 2"))
    for name in ("demo", "demo-llava"):
        (tmp_path / "recipes" / f"{name}.yaml").unlink()
    again = run_script()
    assert again.returncode == 1
