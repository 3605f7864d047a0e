"""`ercsvd sweep`: many variations of one recipe, judged side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ercsvd_deploy.pipelines.cli.options import (
    EXIT_GATE_MISSED,
    AsJson,
    Debug,
    Output,
    complain,
    failures_explained,
    print_json,
    quiet_libraries,
    result_console,
)


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)],
    output: Output = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Points at a time; default what cores and memory allow.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Export the picked model to this directory.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run every point of a grid, share what they have in common, and pick the best."""
    with failures_explained(debug=debug):
        with quiet_libraries():
            from ercsvd_deploy.pipelines.sweeping.file import load_sweep
            from ercsvd_deploy.pipelines.sweeping.points import SweepError, run_sweep

            loaded = load_sweep(file)
            directory = output or loaded.output
            if directory is None:
                raise SweepError("the sweep has no output: give one, or --output DIRECTORY")
            told = Console(stderr=True, markup=False, highlight=False)
            found = run_sweep(
                loaded,
                directory,
                jobs=jobs,
                on_point=lambda name, worked: told.print(f"{'done' if worked else 'FAILED'}: {name}"),
            )
            from ercsvd_deploy.pipelines.sweeping.plot import draw_sweep, missing_texts, sweep_rows

            drawn = [] if missing_texts(found.points) else draw_sweep(found, directory)
        columns, rows = sweep_rows(found)
        if as_json:
            print_json(asdict(found))
        else:
            table = Table(title=f"{len(found.points)} models, the smallest first", title_justify="left")
            for column in columns:
                table.add_column(
                    column, justify="left" if column in ("point", "gates", "front of") else "right"
                )
            for row in rows:
                table.add_row(*row)
            console = result_console()
            console.print(table)
            console.print(f"picked: {found.picked or 'none'}, {found.why}", highlight=False)
            console.print("\n".join(f"written: {path}" for path in drawn), highlight=False)
        for name, why in found.failures.items():
            complain(f"point ({name}): {why}")
        if found.picked is not None and export is not None:
            _export(found.point(found.picked).recipe, export)
        if found.picked is None and loaded.pick is not None:
            complain(found.why)
            raise typer.Exit(EXIT_GATE_MISSED)


def _export(settings: dict[str, Any] | None, directory: Path) -> None:
    """Run the picked recipe to an export."""
    import json

    from pydantic import TypeAdapter

    from ercsvd_deploy.pipelines.cli.progress import on_terminal
    from ercsvd_deploy.pipelines.flow import run_recipe
    from ercsvd_deploy.recipe.sections import Recipe

    assert settings is not None, "the original is never picked"
    placed = settings | {"export": settings["export"] | {"path": str(directory)}}
    recipe = TypeAdapter(Recipe).validate_json(json.dumps(placed))
    with quiet_libraries():
        run_recipe(recipe, progress=on_terminal(Console(stderr=True)))
    result_console().print(f"exported to {directory}", highlight=False)
