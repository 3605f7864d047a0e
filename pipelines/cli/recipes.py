"""Commands that take a recipe: `validate`, `plan`, `run`; the first two take a sweep, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ercsvd_deploy.pipelines.cli.failures import EXIT_FAILED, EXIT_USAGE, command
from ercsvd_deploy.pipelines.cli.messages import complain, print_json, result_console, warn
from ercsvd_deploy.pipelines.cli.options import (
    AsJson,
    Debug,
    Device,
    Force,
    Junit,
    KeepWork,
    LogFile,
    Output,
    Overrides,
    Quiet,
    RecipePath,
    Verbose,
)
from ercsvd_deploy.pipelines.cli.outputs import end_with_gates
from ercsvd_deploy.pipelines.cli.sweeps import looks_like_sweep, plan_sweep, validate_sweep


def validate(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Check a recipe and the files it names, without loading anything."""
    with command(debug=debug):
        from ercsvd_deploy.recipe.load import check_files, load_recipe

        if looks_like_sweep(recipe):
            validate_sweep(recipe, overrides or (), as_json=as_json)
            return
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
        from ercsvd_deploy.pipelines.reporting.screen.plan_tables import render
        from ercsvd_deploy.recipe.load import load_recipe

        if looks_like_sweep(recipe):
            refused = {"--set": overrides, "--machine": machine, "--strict-machine": strict_machine}
            plan_sweep(recipe, output, device, refused, as_json=as_json)
            return
        loaded = load_recipe(recipe, overrides or (), output)
        if machine is None:
            planned = make_plan(loaded, device=find_device(device))
        else:
            try:
                other_machine = parse_machine(machine)
                machine_device = planned_device(other_machine, parse_device(device) if device else None)
            except MachineError as error:
                complain(str(error))
                raise typer.Exit(EXIT_USAGE) from error
            planned = make_plan(loaded, device=machine_device, machine=other_machine)
        planned = planned.with_kernels().with_peak()
        if as_json:
            print_json(planned.as_json())
        else:
            result_console().print(render(planned))
        needs = planned.estimate
        for problem in needs.problems:
            complain(problem)
        for shortage in needs.shortages:
            log = complain if strict_machine else warn
            log(f"{needs.machine.name} may not suffice: {shortage}")
        if needs.problems or (needs.shortages and strict_machine):
            raise typer.Exit(EXIT_FAILED)


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    device: Device = None,
    force: Force = False,
    keep_work: KeepWork = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the stages' results in a directory that runs of several outputs share."
        ),
    ] = None,
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
        from ercsvd_deploy.pipelines.flow import RunOptions, run_unless_finished
        from ercsvd_deploy.pipelines.inputs.model import find_device
        from ercsvd_deploy.pipelines.reporting.screen.terminal import gate_table, render

        options = RunOptions(is_forced=force, keeps_work=keep_work, cache=cache and cache.absolute())
        outcome = run_unless_finished(loaded, device=find_device(device), progress=progress, options=options)
        report, directory = outcome.report, outcome.directory
        if as_json:
            outcome_values = {"directory": str(directory), "nothing_to_do": outcome.was_finished}
            print_json(report.as_json() | outcome_values)
        elif outcome.was_finished:
            console = result_console()
            if report.gates:
                console.print(gate_table(report.gates))
            console.print(f"{directory} is finished and unchanged: nothing to do", highlight=False)
        else:
            console = result_console()
            console.print(render(report))
            console.print(
                f"\nWritten to {directory}. Serve it with:  vllm serve {directory}", highlight=False
            )
        end_with_gates(report.gates, directory, junit)
