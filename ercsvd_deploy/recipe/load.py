"""A recipe: the one YAML file that says which model is compressed, how, and where the result goes.

    recipe = load_recipe(Path("recipes/demo.yaml"), ["factorize.compression_ratio=0.4"])
    check_files(recipe)

`sections`, `stages` and `gates` define the keys of a recipe, `yaml_source` and `overrides` read it,
`messages` explains its mistakes, `reference` documents it; this module is the front door to them. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ercsvd_deploy.format.files.data_files import DATA_FILES, forms_of
from ercsvd_deploy.recipe.fields import RecipeError, quoted
from ercsvd_deploy.recipe.messages import explain
from ercsvd_deploy.recipe.overrides import apply_override, with_override
from ercsvd_deploy.recipe.quantize import Correction, Quantize, QuantizeOverride
from ercsvd_deploy.recipe.reference import recipe_json_schema
from ercsvd_deploy.recipe.sections import (
    Calibration,
    ConversationFile,
    Evaluation,
    Export,
    HubDataset,
    ImageFolder,
    JsonLines,
    LmEval,
    ModelSource,
    ParquetFile,
    PictureDataset,
    Recipe,
    SavedDataset,
    Serving,
    TextDataset,
    TextFile,
)
from ercsvd_deploy.recipe.stages import Factorize, FactorizeStage, QuantizeStage, Recover, RecoverStage, Stage
from ercsvd_deploy.recipe.yaml_source import Node, read_yaml_file

__all__ = [
    "Calibration",
    "Correction",
    "Evaluation",
    "Export",
    "Factorize",
    "FactorizeStage",
    "HubDataset",
    "JsonLines",
    "LmEval",
    "ModelSource",
    "ParquetFile",
    "Quantize",
    "QuantizeOverride",
    "QuantizeStage",
    "Recipe",
    "RecipeError",
    "Recover",
    "RecoverStage",
    "SavedDataset",
    "Serving",
    "Stage",
    "TextDataset",
    "TextFile",
    "canonical",
    "check_files",
    "load_recipe",
    "recipe_json_schema",
]


def load_recipe(path: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Recipe:
    """Read, override and validate a recipe, without checking the files and models that it names.

    Args:
        path: A YAML file.
        overrides: `PATH=VALUE` each, applied in order; VALUE is YAML, and null removes the field. A path
            begins with a section or with the name of a stage, such as `factorize.compression_ratio`.
        output: Replaces `export.path`.

    Raises:
        RecipeError: lists every problem, one a line.
    """
    root = read_yaml_file(path)
    if root.value is None:
        raise RecipeError([f"{root.origin}: the recipe is empty; it needs at least model and stages"])
    if not isinstance(root.value, dict):
        raise RecipeError(
            [f"{root.origin}: the recipe is {quoted(root.plain())}; it must be a mapping (key: value)"]
        )
    for text in overrides:
        root = apply_override(root, text)
    if output is not None:
        root = with_override(root, ("export", "path"), Node(str(output), f"--output {output}"))
    try:
        return Recipe.model_validate(root.plain())
    except ValidationError as error:
        raise explain(error, root.origin_of) from error


def canonical(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with every default written out, as JSON values in the schema's order.

    Files with the same meaning have the same canonical form, which is itself a valid recipe.
    """
    return recipe.model_dump(mode="json")


def check_files(recipe: Recipe) -> None:
    """Check that the local files and the model directory that a recipe names exist.

    A model path that does not exist and does not look like a directory is taken for a name on the Hub, which
    only loading can check.

    Raises:
        RecipeError: lists every missing file, one a line.
    """
    problems = [
        *_missing_model(recipe.model),
        *_missing_texts(recipe),
        *_missing_pictures(recipe),
        *_missing_tasks(recipe),
    ]
    if problems:
        where = f"(paths are relative to {Path.cwd()})"
        raise RecipeError([f"{problem} {where}" for problem in problems])


def _missing_model(model: ModelSource) -> Iterator[str]:
    directory = Path(model.path)
    field = f"field 'model.path' is {quoted(model.path)}"
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            yield f"{field}, which has no config.json; give the directory of a Hugging Face model"
    elif directory.exists():
        yield f"{field}, which is a file; give the directory of a Hugging Face model"
    elif model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        yield f"{field}, which does not exist; give a directory or a name on the Hub such as org/name"


def _missing_tasks(recipe: Recipe) -> Iterator[str]:
    settings = recipe.evaluation.lm_eval
    if settings is not None and settings.include_path is not None and not settings.include_path.is_dir():
        path = quoted(str(settings.include_path))
        yield f"field 'evaluation.lm_eval.include_path' is {path}, which is not a folder; give a folder"


def _missing_texts(recipe: Recipe) -> Iterator[str]:
    datasets: dict[str, TextDataset] = {}
    if recipe.calibration is not None:
        if recipe.calibration.dataset is not None:
            datasets["calibration.dataset"] = recipe.calibration.dataset
        for number, dataset in enumerate(recipe.calibration.datasets):
            datasets[f"calibration.datasets.{number}"] = dataset
    for name, text in recipe.evaluation.perplexity.items():
        datasets[f"evaluation.perplexity.{name}"] = text
    for field, dataset in datasets.items():
        if isinstance(dataset, HubDataset):
            continue
        key = dataset.key
        path = getattr(dataset, key)
        if not path.exists():
            yield f"field '{field}.{key}' is {quoted(str(path))}, which does not exist; give a file or folder"
            continue
        forms = list(forms_of(path))
        if key in forms or (path.is_file() and forms in ([], ["text"]) and key != "saved"):
            continue
        if forms:
            named = f"field '{field}.{key}' is {quoted(str(path))}"
            yield f"{named}, whose form is {forms[0]}; write {forms[0]}: {path}"
        elif key in DATA_FILES:
            lacking = f"a folder without {', '.join(DATA_FILES[key])}"
            yield f"field '{field}.{key}' is {quoted(str(path))}, {lacking}; give a file or folder"
        elif path.is_file():
            yield f"field '{field}.{key}' is {quoted(str(path))}, which is a file; give a folder"


def _missing_pictures(recipe: Recipe) -> Iterator[str]:
    datasets: dict[str, PictureDataset] = {
        f"evaluation.visual_questions.{name}.dataset": questions.dataset
        for name, questions in recipe.evaluation.visual_questions.items()
    }
    if recipe.vision is not None and recipe.vision.calibration is not None:
        datasets["vision.calibration"] = recipe.vision.calibration
    for field, dataset in datasets.items():
        if isinstance(dataset, ConversationFile):
            if not dataset.conversations.is_file():
                path = quoted(str(dataset.conversations))
                yield f"field '{field}.conversations' is {path}, which is not a file; give a file"
            if dataset.image_root is not None and not dataset.image_root.is_dir():
                path = quoted(str(dataset.image_root))
                yield f"field '{field}.image_root' is {path}, which is not a folder; give a folder"
        elif isinstance(dataset, ImageFolder) and not dataset.folder.is_dir():
            path = quoted(str(dataset.folder))
            yield f"field '{field}.folder' is {path}, which is not a folder; give a folder"
