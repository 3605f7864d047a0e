"""The way in from Python: `ercsvd_deploy.pipelines.plan` and `run`."""

from __future__ import annotations

from ercsvd_deploy.pipelines import plan, run
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter


def test_plan_and_run_take_a_recipe_or_its_file(write_recipe: RecipeWriter) -> None:
    path = write_recipe()
    recipe = load_recipe(path)
    for given in (path, str(path), recipe):
        assert plan(given).candidates == make_plan(recipe).candidates
    report, directory = run(path)
    again, _ = run_recipe(recipe)
    assert report.compressed == again.compressed
    assert directory == recipe.export.path
