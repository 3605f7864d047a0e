"""Loading recipes: those of the repository, the files that they name, and what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ercsvd_deploy.recipe.load import check_files, load_recipe, recipe_json_schema
from tests.recipe.written import MINIMAL, ROOT, VISION, missing_files, problems_of, written

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
INTEGERS_ALONE = [
    "demo-real",
    "llama-3-8b-3bit",
    "llama-3.3-70b",
    "mistral-small-3.2",
    "phi-4",
    "qwen3-30b-a3b",
    "qwen3-32b",
]


def test_many_problems_are_reported_together(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("0.2", "2, beta: x, rank: 3").replace("some/model", "3"))
    assert len(problems_of(path, "serving.tensor_parallel_sizes=[0]", "export.paht=a")) == 6


def test_check_files_names_everything_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, MINIMAL)
    recipe = load_recipe(
        path,
        [
            "model.path=./nowhere",
            "calibration.dataset={jsonl: lines.jsonl}",
            "evaluation.perplexity={here: recipe.yaml, gone: gone.txt, folder: ., far: {hub: org/data}}",
        ],
    )
    assert missing_files(recipe).splitlines() == [
        f"field 'model.path' is './nowhere', which does not exist; give a directory or a name on the Hub "
        f"such as org/name (paths are relative to {tmp_path})",
        f"field 'calibration.dataset.jsonl' is 'lines.jsonl', which does not exist; give a file or folder "
        f"(paths are relative to {tmp_path})",
        f"field 'evaluation.perplexity.gone.text' is 'gone.txt', which does not exist; give a file or folder "
        f"(paths are relative to {tmp_path})",
        f"field 'evaluation.perplexity.folder.text' is '.', a folder without *.txt, *.txt.gz, *.md; give "
        f"a file or folder (paths are relative to {tmp_path})",
    ]


@pytest.mark.parametrize("model", ["/no/where", "../nowhere", "~/nowhere", "a/b/c", "recipe.yaml", "empty"])
def test_check_files_refuses_a_model_that_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    recipe = load_recipe(written(tmp_path, MINIMAL), [f"model.path={model}"])
    assert f"field 'model.path' is '{model}', which" in missing_files(recipe)


@pytest.mark.parametrize("model", ["org/name", "gpt2", "full"])
def test_check_files_accepts_a_hub_name_or_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    recipe = load_recipe(written(tmp_path, MINIMAL), [f"model.path={model}"])
    assert "text.txt" in missing_files(recipe)
    (tmp_path / "text.txt").touch()
    check_files(recipe)


@pytest.mark.parametrize(
    ("form", "name", "meant"),
    [
        ("text", "rows.jsonl", "jsonl"),
        ("text", "rows.ndjson.gz", "jsonl"),
        ("text", "ROWS.JSONL", "jsonl"),
        ("text", "rows.parquet", "parquet"),
        ("jsonl", "rows.parquet", "parquet"),
        ("parquet", "rows.jsonl", "jsonl"),
        ("saved", "rows.jsonl", "jsonl"),
        ("text", "folder/rows.parquet", "parquet"),
        ("jsonl", "folder/notes.txt", "text"),
        ("text", "folder/dataset_info.json", "saved"),
        ("parquet", "folder/dataset_dict.json", "saved"),
    ],
)
def test_check_files_tells_the_form_that_data_has(
    form: str, name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    path = name.partition("/")[0]
    recipe = load_recipe(written(tmp_path, MINIMAL), [f"calibration.dataset={{{form}: {path}}}"])
    assert f"write {meant}: {path}" in missing_files(recipe)


@pytest.mark.parametrize(("form", "name"), [("text", "notes"), ("text", "a.TXT"), ("jsonl", "rows.txt")])
def test_check_files_takes_files_of_any_other_name(
    form: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    Path(name).touch()
    overrides = ["model.path=model", f"calibration.dataset={{{form}: {name}}}"]
    check_files(load_recipe(written(tmp_path, MINIMAL), overrides))


def test_check_files_looks_for_the_folder_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        written(tmp_path, MINIMAL), ["evaluation.lm_eval={tasks: [mine], include_path: nowhere}"]
    )
    assert "'evaluation.lm_eval.include_path' is 'nowhere', which is not a folder" in missing_files(recipe)


def test_check_files_looks_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        written(tmp_path, VISION),
        [
            "vision.calibration.image_root=nowhere",
            "evaluation.visual_questions={q: {dataset: {conversations: questions.jsonl}}}",
        ],
    )
    missing = missing_files(recipe)
    assert "'vision.calibration.conversations' is 'pictures.jsonl', which is not a file" in missing
    assert "'vision.calibration.image_root' is 'nowhere', which is not a folder" in missing
    assert "'evaluation.visual_questions.q.dataset.conversations' is 'questions.jsonl'" in missing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n#\n# ")
    recipe = load_recipe(path)
    jsonschema.Draft202012Validator(recipe_json_schema()).validate(yaml.safe_load(text))
    assert recipe.export.path is not None
    # any low rank costs a real model more than integers do, and experts have none
    assert recipe.may_factorize == (path.stem not in INTEGERS_ALONE)
    if recipe.factorize is not None:
        assert recipe.factorize.method == ("erc_svd" if recipe.target is None else "svd_llm")
    assert recipe.calibration is not None
    assert recipe.calibration.seed == 3


def test_the_recipes_we_promise_are_shipped() -> None:
    promised = (
        "demo demo-3bit llama-2-7b llama-2-13b llama-3-8b llama-3-8b-3bit mistral-7b opt-6.7b qwen2.5-7b "
        "qwen3-8b qwen3-30b-a3b vicuna-7b gemma-3-12b llava-onevision-7b qwen2.5-vl-7b qwen3-vl-8b "
        "qwen3-32b llama-3.3-70b mistral-small-3.2 phi-4"
    )
    assert set(promised.split()) <= {path.stem for path in SHIPPED}


def test_the_demo_needs_only_files_of_this_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_files(load_recipe(ROOT / "recipes" / "demo.yaml"))


def test_reading_a_recipe_imports_no_torch() -> None:
    code = "import sys, ercsvd_deploy.recipe.load; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
