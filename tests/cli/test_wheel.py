"""What a wheel of this package holds, and what is promised of installing it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from ercsvd_deploy import installation
from ercsvd_deploy.pipelines.reporting.card import make_card
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.ready import ready_recipes
from tests.recipe_runs import invoke
from tests.reporting.sample_reports import sample_document

ROOT = Path(__file__).parents[2]
NOT_BUILT = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "out", "build", "*.egg-info", ".*_cache", "shared"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources as `pip wheel` does."""
    sources = tmp_path_factory.mktemp("sources") / "checkout"
    shutil.copytree(ROOT, sources, symlinks=True, ignore=NOT_BUILT)
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_is_called_what_is_promised_and_is_complete(wheel: Path) -> None:
    assert wheel.name == installation.WHEEL
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {f"ercsvd_deploy/{recipe}" for recipe in recipes} <= names
    modules = {
        f"ercsvd_deploy/{path.relative_to(ROOT / 'ercsvd_deploy').as_posix()}"
        for folder in ("ercsvd_deploy", "ercsvd_deploy/pipelines", "ercsvd_deploy/exporters")
        for path in (ROOT / folder).resolve().rglob("*.py")
        if folder == "ercsvd_deploy"
    }
    assert modules - {"ercsvd_deploy/exporters/vllm/engines/without_torchvision/sitecustomize.py"} <= names
    assert any(name.endswith("report.html.j2") for name in names)


@pytest.mark.slow
def test_an_installed_wheel_has_the_recipes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    ercsvd = [sys.executable, "-m", "ercsvd_deploy", "recipes"]

    def output(*arguments: str) -> str:
        return subprocess.check_output([*ercsvd, *arguments], text=True, cwd=tmp_path, env=environment)

    listed = json.loads(output("list", "--json"))
    assert {each["name"] for each in listed} == {each.name for each in ready_recipes()}
    (tmp_path / "mine.yaml").write_text(output("show", "llama-3-8b"))
    assert load_recipe(tmp_path / "mine.yaml").model.path == "meta-llama/Meta-Llama-3-8B"


def test_ready_recipes_are_listed_and_shown() -> None:
    found = ready_recipes()
    assert {each.kind for each in found} == {"recipe", "sweep"}
    assert len(found) == len(list((ROOT / "recipes").rglob("*.yaml")))
    for each in found:
        assert 10 < len(each.about) < 140, each
        code, output, _ = invoke("recipes", "show", each.name)
        assert (code, yaml.safe_load(output)) == (0, yaml.safe_load(each.file.read_text()))
    code, output, _ = invoke("recipes", "list")
    assert code == 0
    assert all(each.name in output for each in found)
    assert invoke("recipes")[1] == output
    for name in ("lama-3-8b", "", "../demo"):
        code, _, error = invoke("recipes", "show", name)
        assert code == 2
        assert "no ready recipe" in error
    assert "did you mean llama-3-8b?" in invoke("recipes", "show", "lama-3-8b")[2]


def test_nothing_promises_an_install_that_no_index_has() -> None:
    """Beside an install, `pip install 'ercsvd-deploy[extra]'` fetches the extra's packages alone."""
    assert not installation.IS_PUBLISHED
    card = make_card(sample_document(), ROOT / "nowhere")
    files = {"card": card} | {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in (
            ROOT / "README.md",
            ROOT / "Dockerfile",
            *(ROOT / "docs").rglob("*.*ml"),
            *(ROOT / "docs").rglob("*.md"),
        )
    }
    for name, text in files.items():
        for line in text.splitlines():
            found = re.search(r"pip install .*?(?<![\w./-])'?ercsvd-deploy\b", line)
            assert found is None or "beside an install" in line, f"{name}: {line}"
    assert f"pip install './{installation.WHEEL}[compress]'" in card
    assert f"pip install 'vllm>=0.29' './{installation.WHEEL}'" in card
    assert installation.MAKE_WHEEL in card


def test_the_command_is_the_indexs_once_it_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "IS_PUBLISHED", True)
    assert installation.install_command("compress", "eval") == "pip install 'ercsvd-deploy[compress,eval]'"
    assert installation.install_command(beside="vllm") == "pip install 'vllm' 'ercsvd-deploy'"
    assert installation.where_from() is None
