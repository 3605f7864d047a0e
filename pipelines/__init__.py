"""The pipelines of a recipe and the command line. From Python, use `plan` and `run`.

Imported as `ercsvd_deploy.pipelines`; the folder lies at the root of the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if __name__ != "ercsvd_deploy.pipelines":
    raise ImportError("import this package as ercsvd_deploy.pipelines (pip install -e . makes it importable)")

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.planning.plan import Plan
    from ercsvd_deploy.pipelines.reporting.report.document import Report
    from ercsvd_deploy.recipe.sections import Recipe

# Numerical libraries are imported inside the functions, so that the command line starts quickly.


def plan(recipe: Recipe | str | Path) -> Plan:
    """Plan a recipe from the model's config alone, as `ercsvd plan` does.

    Args:
        recipe: A recipe, or the path of its YAML file.

    Raises:
        RecipeError, ArchitectureError, PlanError: the recipe, the model or both together cannot work.
    """
    from ercsvd_deploy.pipelines.planning.plan import make_plan

    return make_plan(_load_if_path(recipe))


def run(recipe: Recipe | str | Path) -> tuple[Report, Path]:
    """Compress, judge and export, as `ercsvd run` does; an interrupted run is continued.

    Args:
        recipe: A recipe, or the path of its YAML file; its `export.path` must be set.

    Returns:
        The report, with the recipe's gates judged, and the finished directory.

    Raises:
        RecipeError, ArchitectureError, PlanError, CalibrationError, CheckpointError, ExportError,
            TargetInUseError: the recipe, the model, a text or the output cannot be used.
    """
    from ercsvd_deploy.pipelines.flow import run_recipe

    return run_recipe(_load_if_path(recipe))


def _load_if_path(recipe: Recipe | str | Path) -> Recipe:
    from ercsvd_deploy.recipe.load import load_recipe

    return load_recipe(Path(recipe)) if isinstance(recipe, str | Path) else recipe
