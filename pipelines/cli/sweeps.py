"""The command `sweep`, and what `validate` and `plan` do with a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ercsvd_deploy.pipelines.cli.failures import EXIT_FAILED, EXIT_GATE_MISSED, EXIT_USAGE, command
from ercsvd_deploy.pipelines.cli.messages import complain, print_json, result_console, warn
from ercsvd_deploy.pipelines.cli.options import (
    AsJson,
    Debug,
    Device,
    Force,
    KeepWork,
    LogFile,
    Output,
    Quiet,
    Verbose,
)
from ercsvd_deploy.pipelines.cli.outputs import end_with_gates

if TYPE_CHECKING:
    from rich.table import Table

    from ercsvd_deploy.pipelines.sweeping.results import SweepResult

_LEFT_COLUMNS = ("point", "gates", "front of")


def looks_like_sweep(file: Path) -> bool:
    """Whether a file has the keys of a sweep; reading it reports what is wrong with it."""
    from ercsvd_deploy.pipelines.sweeping.file import is_sweep

    return is_sweep(file)


def validate_sweep(file: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Check a sweep, its points' recipes, and the files that they name."""
    from ercsvd_deploy.pipelines.sweeping.file import load_sweep, sweep_points
    from ercsvd_deploy.recipe.fields import RecipeError
    from ercsvd_deploy.recipe.load import check_files

    if overrides:
        complain("--set is for recipes; a sweep has `set` for all its points")
        raise typer.Exit(EXIT_USAGE)
    points = sweep_points(load_sweep(file))
    for point in points:
        try:
            check_files(point.recipe)
        except RecipeError as error:
            raise RecipeError([f"point ({point.name}): {problem}" for problem in error.problems]) from error
    if as_json:
        print_json({"sweep": str(file), "valid": True, "points": [point.name for point in points]})
    else:
        result_console().print(f"{file}: valid, {len(points)} points", highlight=False)


def plan_sweep(
    file: Path, output: Path | None, device: str | None, refused: Mapping[str, Any], *, as_json: bool
) -> None:
    """Show what the points of a sweep make, and what it needs; fails if a point cannot work."""
    from ercsvd_deploy.pipelines.inputs.model import default_device, find_device
    from ercsvd_deploy.pipelines.sweeping.baselines import points_and_baselines
    from ercsvd_deploy.pipelines.sweeping.file import load_sweep
    from ercsvd_deploy.pipelines.sweeping.needs import affordable_jobs, check_needs, plan_points, sweep_needs
    from ercsvd_deploy.pipelines.sweeping.points import gates_for_the_export

    refused_options = [name for name, value in refused.items() if value]
    if refused_options:
        complain(f"{', '.join(refused_options)}: not for a sweep; plan its recipe with it")
        raise typer.Exit(EXIT_USAGE)
    loaded = load_sweep(file)
    points = points_and_baselines(loaded)
    layer_device = find_device(device) or default_device()
    plans, failures = plan_points(points, layer_device)
    needs = sweep_needs(plans)
    jobs = affordable_jobs(needs, len(points), layer_device)
    directory = output or loaded.output
    warnings = [] if directory is None else check_needs(needs, directory.absolute(), jobs)
    for_the_export = sorted({gate for point in points for gate in gates_for_the_export(point.recipe)})
    if as_json:
        point_values = [
            {
                "name": name,
                "num_bytes": plan.candidates[-1].num_bytes,
                "linear_bits_per_weight": plan.candidates[-1].linear_bits_per_weight,
                "peak_host_bytes": plan.estimate.peak_host_bytes,
            }
            for name, plan in plans.items()
        ]
        print_json(
            {
                "points": point_values,
                "failures": failures,
                "jobs": jobs,
                "needs": asdict(needs),
                "warnings": warnings,
                "gates_for_the_export": for_the_export,
            }
        )
    else:
        console = result_console()
        rows = [
            (
                name,
                f"{plan.candidates[-1].num_bytes:,}",
                f"{plan.candidates[-1].linear_bits_per_weight:.2f}",
                f"{plan.estimate.peak_host_bytes / 2**20:,.0f} MiB",
            )
            for name, plan in plans.items()
        ]
        title = f"{len(points)} points, {jobs} at a time"
        console.print(_table(title, ("point", "bytes", "bits per weight", "memory"), rows))
        if for_the_export:
            console.print(f"judged on the export alone: {', '.join(for_the_export)}", highlight=False)
    for warning in warnings:
        warn(warning)
    for name, why in failures.items():
        complain(f"point ({name}): {why}")
    if failures:
        raise typer.Exit(EXIT_FAILED)


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)],
    output: Output = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Points at a time; default what cores and memory allow.")
    ] = None,
    device: Device = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Export the picked model to this directory.")
    ] = None,
    force: Force = False,
    keep_work: KeepWork = False,
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
        from ercsvd_deploy.pipelines.sweeping.run import SweepError, SweepOptions, run_sweep

        directory = output or loaded.output
        if directory is None:
            raise SweepError("the sweep has no output: give one, or --output DIRECTORY")
        options = SweepOptions(jobs, device, export, keeps_work=keep_work, is_forced=force)
        result, exported = run_sweep(loaded, directory, options=options, progress=progress)
        pictures = _draw(result, directory)
        if as_json:
            print_json(asdict(result))
        else:
            _print(result, pictures)
        for name, why in result.failures.items():
            complain(f"point ({name}): {why}")
        if exported is not None and export is not None:
            if not as_json:
                result_console().print(f"exported to {export}", highlight=False)
            gates = exported.gates
            if not result.failures:
                end_with_gates(gates, export, None)
        if result.failures:
            raise typer.Exit(EXIT_FAILED)
        if result.picked is None and loaded.pick is not None:
            complain(result.why)
            raise typer.Exit(EXIT_GATE_MISSED)


def _draw(result: SweepResult, directory: Path) -> list[Path]:
    """Draw the sweep's pictures; one that fails is a warning, since the sweep itself has succeeded."""
    from ercsvd_deploy.pipelines.sweeping.plot import draw_sweep, missing_texts

    if missing_texts(result.points):
        return []
    try:
        return draw_sweep(result, directory)
    except Exception as error:  # noqa: BLE001 - a picture is not worth the sweep
        why = f"{type(error).__name__}: {error}"
        warn(f"no picture was drawn ({why}); {directory / 'sweep.json'} has the figures")
        return []


def _print(result: SweepResult, pictures: Sequence[Path]) -> None:
    from ercsvd_deploy.pipelines.sweeping.plot import sweep_rows

    columns, rows = sweep_rows(result)
    console = result_console()
    console.print(_table(f"{len(result.points)} models, the smallest first", columns, rows))
    console.print(f"picked: {result.picked or 'none'}, {result.why}", highlight=False)
    if result.gates_for_the_export:
        listed = ", ".join(result.gates_for_the_export)
        console.print(f"not judged here, but on the export: {listed}", highlight=False)
    console.print("\n".join(f"written: {path}" for path in pictures), highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in _LEFT_COLUMNS else "right")
    for row in rows:
        table.add_row(*row)
    return table
