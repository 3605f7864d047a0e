"""Commands that take a recipe, or a sweep over one: `validate`, `plan`, `run`, `sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ercsvd_deploy.pipelines.cli.failures import EXIT_FAILED, EXIT_GATE_MISSED, EXIT_USAGE, command
from ercsvd_deploy.pipelines.cli.messages import complain, print_json, result_console, warn
from ercsvd_deploy.pipelines.cli.options import (
    AsJson,
    Debug,
    Device,
    Junit,
    LogFile,
    Output,
    Overrides,
    Quiet,
    RecipePath,
    Verbose,
)
from ercsvd_deploy.pipelines.cli.outputs import end_with_gates

if TYPE_CHECKING:
    from rich.table import Table

    from ercsvd_deploy.pipelines.sweeping.points import SweepResult


def validate(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Check a recipe and the files it names, without loading anything."""
    with command(debug=debug):
        from ercsvd_deploy.recipe.load import check_files, load_recipe

        check_files(load_recipe(recipe, overrides or ()))
        if as_json:
            print_json({"recipe": str(recipe), "valid": True})
        else:
            result_console().print(f"{recipe}: valid", highlight=False)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    device: Device = None,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="gpu=SIZE,...",
            help="Ask about another machine, e.g. gpu=80GiB,memory=512GiB,disk=1TiB,flops=300T or gpu=none; "
            "a key left out is not judged.",
        ),
    ] = None,
    strict_machine: Annotated[
        bool,
        typer.Option("--strict-machine", help="Fail if the machine lacks something, instead of a warning."),
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Show what a run makes and needs, from the model's config alone; fails if the recipe cannot work."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file):
        from ercsvd_deploy.pipelines.inputs.model import find_device, parse_device
        from ercsvd_deploy.pipelines.planning.machine import MachineError, parse_machine, planned_device
        from ercsvd_deploy.pipelines.planning.plan import make_plan
        from ercsvd_deploy.pipelines.reporting.plan_tables import render
        from ercsvd_deploy.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or (), output)
        if machine is None:
            planned = make_plan(loaded, device=find_device(device))
        else:
            try:
                asked = parse_machine(machine)
                there = planned_device(asked, parse_device(device) if device else None)
            except MachineError as error:
                complain(str(error))
                raise typer.Exit(EXIT_USAGE) from error
            planned = make_plan(loaded, device=there, machine=asked)
        planned = planned.with_kernels().with_peak()
        if as_json:
            print_json(planned.as_json())
        else:
            result_console().print(render(planned))
        needs = planned.estimate
        for problem in needs.problems:
            complain(problem)
        for shortage in needs.shortages:
            tell = complain if strict_machine else warn
            tell(f"{needs.machine.name} may not suffice: {shortage}")
        if needs.problems or (needs.shortages and strict_machine):
            raise typer.Exit(EXIT_FAILED)


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    device: Device = None,
    junit: Junit = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Compress, evaluate and export; prints what was gained and lost."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file) as progress:
        from ercsvd_deploy.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or (), output)
        from ercsvd_deploy.pipelines.flow import run_recipe
        from ercsvd_deploy.pipelines.inputs.model import find_device
        from ercsvd_deploy.pipelines.reporting.terminal import render

        report, directory = run_recipe(loaded, device=find_device(device), progress=progress)
        if as_json:
            print_json(report.as_json() | {"directory": str(directory)})
        else:
            console = result_console()
            console.print(render(report))
            console.print(
                f"\nWritten to {directory}. Serve it with:  vllm serve {directory}", highlight=False
            )
        end_with_gates(report.gates, directory, junit)


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
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Run every point of a grid, share what they have in common, and pick the best."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file) as progress:
        from ercsvd_deploy.pipelines.sweeping.file import load_sweep

        loaded = load_sweep(file)
        from ercsvd_deploy.pipelines.sweeping.plot import draw_sweep, missing_texts
        from ercsvd_deploy.pipelines.sweeping.points import SweepError, export_point, run_sweep

        directory = output or loaded.output
        if directory is None:
            raise SweepError("the sweep has no output: give one, or --output DIRECTORY")
        found = run_sweep(loaded, directory, jobs=jobs, progress=progress)
        drawn = [] if missing_texts(found.points) else draw_sweep(found, directory)
        if as_json:
            print_json(asdict(found))
        else:
            console = result_console()
            console.print(_sweep_table(found))
            console.print(f"picked: {found.picked or 'none'}, {found.why}", highlight=False)
            console.print("\n".join(f"written: {path}" for path in drawn), highlight=False)
        for name, why in found.failures.items():
            complain(f"point ({name}): {why}")
        if found.picked is not None and export is not None:
            settings = found.point(found.picked).recipe
            assert settings is not None, "the original is never picked"
            export_point(settings, export, progress)
            if not as_json:
                result_console().print(f"exported to {export}", highlight=False)
        if found.picked is None and loaded.pick is not None:
            complain(found.why)
            raise typer.Exit(EXIT_GATE_MISSED)


def _sweep_table(found: SweepResult) -> Table:
    from rich.table import Table

    from ercsvd_deploy.pipelines.sweeping.plot import sweep_rows

    columns, rows = sweep_rows(found)
    table = Table(title=f"{len(found.points)} models, the smallest first", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("point", "gates", "front of") else "right")
    for row in rows:
        table.add_row(*row)
    return table
