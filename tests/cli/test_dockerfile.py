"""The Dockerfile, as far as that can be checked without building it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ercsvd_deploy.recipe.load import check_files, load_recipe

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTION = re.compile(r"^([A-Z]+) (.*(?:\\\n.*)*)", re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """Return (name, arguments) of every instruction, continued lines joined, comments left out."""
    without_comments = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)
    return [
        (name, " ".join(arguments.replace("\\\n", " ").split()))
        for name, arguments in INSTRUCTION.findall(without_comments)
    ]


def test_stages_are_built_before_they_are_used() -> None:
    stages: list[str] = []
    for name, arguments in instructions():
        used = re.findall(r"(?:--from=|,from=)([\w.-]+)", arguments)
        assert set(used) <= set(stages), arguments
        if name == "FROM":
            image, _, stage = arguments.partition(" AS ")
            assert stage
            assert image.startswith(("python:", "vllm/vllm-openai:"))
            stages.append(stage)
    assert stages == ["wheel", "environment", "compress", "serve"]


def test_copied_files_exist() -> None:
    for name, arguments in instructions():
        if name in ("COPY", "ADD") and "--from=" not in arguments:
            *sources, _ = arguments.split()
            assert sources
            assert all((ROOT / source).exists() for source in sources)
    for folder in ("ercsvd_deploy/pipelines", "ercsvd_deploy/exporters"):
        assert (ROOT / folder / "__init__.py").is_file()  # the links that the wheel is built through


def test_entry_points_extras_and_versions_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry_points = [arguments for name, arguments in instructions() if name == "ENTRYPOINT"]
    assert entry_points == ['["ercsvd"]', '["vllm", "serve"]']
    assert "ercsvd" in project["scripts"]
    (group,) = re.findall(r'entry_points as e; e\(group="([\w.]+)"\)\["ercsvd"\]', TEXT)
    assert "ercsvd" in project["entry-points"][group]
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", TEXT)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (torch,) = re.findall(r"^ARG TORCH=(torch==\S+)$", TEXT, flags=re.MULTILINE)
    assert f"TORCH ?= {torch}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    (python,) = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", TEXT, flags=re.MULTILINE)
    assert project["requires-python"] == f">={python}"


def test_images_end_without_root_and_name_no_package_index() -> None:
    last_user: dict[str, str] = {}
    stage = ""
    for name, arguments in instructions():
        stage = arguments.partition(" AS ")[2] if name == "FROM" else stage
        if name == "USER":
            last_user[stage] = arguments
    assert last_user == {"compress": "ercsvd", "serve": "ercsvd"}
    assert re.findall(r"https?://(?!127\.0\.0\.1)", TEXT) == []
    assert '${TORCH_INDEX:+--index-url "$TORCH_INDEX"}' in TEXT


def test_its_own_commands_work_in_its_own_images() -> None:
    """What `compress` is told to run needs no vLLM, and writes what `serve` is told to serve."""
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", TEXT)
    assert "serve" not in extras.split(",")
    (recipe_file,) = re.findall(r"ercsvd-compress run (\S+)", TEXT)
    recipe = load_recipe(ROOT / recipe_file)
    assert recipe.gates is None or recipe.gates.serving_parity is None
    served = re.findall(r'-v "\$PWD/(\S+?):/model:ro"', TEXT)
    assert [str(recipe.export.path)] == served
    with_parity = load_recipe(ROOT / "recipes" / "demo.yaml", ["gates.serving_parity=null"])
    assert with_parity.gates is not None
    assert with_parity.gates.serving_parity is None


def test_its_recipe_finds_its_files_in_the_mounted_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (recipe_file,) = re.findall(r"ercsvd-compress run (\S+)", TEXT)
    check_files(load_recipe(Path(recipe_file)))
