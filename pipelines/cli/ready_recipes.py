"""The command `recipes`: the ready recipes that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ercsvd_deploy.pipelines.cli.failures import command
from ercsvd_deploy.pipelines.cli.messages import print_json, result_console
from ercsvd_deploy.pipelines.cli.options import AsJson, Debug


def recipes(
    action: Annotated[Literal["list", "show"], typer.Argument(help="list them, or show one.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Which one, as `list` calls it.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the ready recipes that come with the package, or print one, to be edited and run."""
    with command(debug=debug):
        from ercsvd_deploy.recipe.ready import find_ready, ready_recipes

        if action == "show":
            sys.stdout.write(find_ready(name).read_text(encoding="utf-8"))
            return
        recipes = ready_recipes()
        if as_json:
            print_json(
                [{"name": recipe.name, "about": recipe.about, "kind": recipe.kind} for recipe in recipes]
            )
            return
        console = result_console()
        width = max(len(recipe.name) for recipe in recipes)
        for recipe in recipes:
            console.print(f"{recipe.name:{width}}  {recipe.about}", highlight=False)
        file_name = Path(f"{recipes[0].name}.yaml").name
        console.print(f"\nercsvd recipes show {recipes[0].name} > {file_name}", highlight=False)
