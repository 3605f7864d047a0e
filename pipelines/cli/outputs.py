"""Commands that take a directory that a recipe wrote: `status`, `clean`, `verify`, `check`, `report`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ercsvd_deploy.pipelines.cli.failures import EXIT_FAILED, EXIT_GATE_MISSED, command
from ercsvd_deploy.pipelines.cli.messages import complain, print_json, result_console
from ercsvd_deploy.pipelines.cli.options import AsJson, Debug, Junit, LogFile, Quiet, Verbose

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.gates import GateResult
    from ercsvd_deploy.pipelines.sweeping.status import SweepStatus

_MOST_LISTED = 40  # problems that `verify` lists
Target = Annotated[Path, typer.Argument(help="The directory a recipe writes.", show_default=False)]
ExportDirectory = Annotated[Path, typer.Argument(help="An export.", show_default=False)]


def status(output: Target, as_json: AsJson = False, debug: Debug = False) -> None:
    """Tell whether an output is finished, running or interrupted, and what of it is done."""
    with command(debug=debug):
        from ercsvd_deploy.pipelines.state.status import output_status
        from ercsvd_deploy.pipelines.sweeping.status import sweep_status

        sweep_state = sweep_status(output)
        if sweep_state is not None:
            if as_json:
                print_json({"output": str(output), "sweep": asdict(sweep_state)})
            else:
                result_console().print(_sweep_lines(output, sweep_state), highlight=False, markup=False)
            return
        output_state = output_status(output)
        if as_json:
            print_json(asdict(output_state))
            return
        absent = "there, but not an export of this tool" if output.exists() else "not there"
        absent = "results of stages that runs share" if output_state.is_shared else absent
        word = "running" if output_state.running else "finished" if output_state.finished else absent
        lines = [f"{output}: {word}"]
        lines += [
            f"  {stage.name}: {stage.pieces} pieces, {stage.num_bytes:,} bytes"
            for stage in output_state.stages
        ]
        if not output_state.running:
            lines.append(
                "an unfinished run can be continued by the same command, or removed by `ercsvd clean`"
                if output_state.stages
                else "nothing of an unfinished run is there"
            )
        result_console().print("\n".join(lines), highlight=False, markup=False)


def _sweep_lines(output: Path, status: SweepStatus) -> str:
    """Return the lines that describe a sweep's status."""
    word = "running" if status.running else "interrupted" if status.unfinished else "finished"
    counts = (
        f"{len(status.finished)} points done, {len(status.failed)} failed, {len(status.unfinished)} to do"
    )
    lines = [f"{output}: a sweep, {word}; {counts}"]
    lines += [f"  failed: {name}: {why}" for name, why in status.failed.items()]
    if status.picked is not None:
        lines.append(f"  picked: {status.picked}")
    if not status.running and (status.unfinished or status.failed):
        lines.append("the same command goes on with what is missing; `ercsvd clean` removes what stages left")
    return "\n".join(lines)


def clean(output: Target, debug: Debug = False) -> None:
    """Remove what an unfinished run left, or what a directory of `--cache` holds; a finished export stays."""
    with command(debug=debug):
        from ercsvd_deploy.pipelines.state.lock import remove_unfinished, work_path
        from ercsvd_deploy.pipelines.state.shared import remove_shared
        from ercsvd_deploy.pipelines.sweeping.file import WORK

        places = (output, output / WORK)  # of a run, and of a sweep
        removed = [str(work_path(place)) for place in places if remove_unfinished(place.absolute())]
        stages, in_use = remove_shared(output)
        removed += [str(output / name) for name in stages]
        lines = [f"removed {path}" for path in removed] + [f"in use: {output / name}" for name in in_use]
        result_console().print(
            "\n".join(lines) or f"{output}: nothing to remove", highlight=False, markup=False
        )


def verify(
    directory: ExportDirectory,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Compare every tensor and file of an export with the checksums it was written with."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file):
        from ercsvd_deploy.format.files.manifest import verify_export
        from ercsvd_deploy.pipelines.reporting.report.check import verify_report
        from ercsvd_deploy.pipelines.reporting.report.files import REPORT_FILES

        verification = verify_export(directory, unlisted=REPORT_FILES)
        verification = replace(verification, problems=(*verification.problems, *verify_report(directory)))
        if as_json:
            print_json(
                asdict(verification) | {"directory": str(directory), "sound": not verification.problems}
            )
        elif not verification.problems:
            counts = f"{verification.num_tensors} tensors and {verification.num_files} files"
            result_console().print(
                f"{directory}: sound; {counts} are as written by version {verification.written_by}",
                highlight=False,
                markup=False,
            )
        if verification.problems:
            problems = verification.problems
            listed = "\n  ".join(problems[:_MOST_LISTED])
            unlisted = len(problems) - _MOST_LISTED
            and_more = f"\n  and {unlisted} more" if unlisted > 0 else ""
            complain(
                f"{directory} is not what was exported ({len(problems)} problems):\n  {listed}{and_more}\n"
                "copy or export it again"
            )
            raise typer.Exit(EXIT_FAILED)


def check(
    directory: ExportDirectory,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Judge by this recipe's gates instead of the export's own."),
    ] = None,
    junit: Junit = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Judge an export's report by gates, without computing anything again."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file):
        from ercsvd_deploy.pipelines.reporting.report.check import check_export
        from ercsvd_deploy.pipelines.reporting.screen.terminal import gate_table

        results = check_export(directory, recipe)
        if as_json:
            passed = all(result.passed for result in results)
            gates = [asdict(result) for result in results]
            print_json({"directory": str(directory), "passed": passed, "gates": gates})
        else:
            result_console().print(gate_table(results))
        end_with_gates(results, directory, junit)


def end_with_gates(results: list[GateResult], directory: Path, junit: Path | None) -> None:
    """Write the verdicts as JUnit XML if a file is given, and exit with code 3 if a gate was missed."""
    from ercsvd_deploy.format.files.atomic_files import write_text_atomically
    from ercsvd_deploy.pipelines.judging.junit import junit_xml
    from ercsvd_deploy.pipelines.judging.remedies import suggest_remedy
    from ercsvd_deploy.pipelines.reporting.report.document import load_report

    if junit is not None:
        write_text_atomically(junit, junit_xml(results, str(directory)))
    failing = [result for result in results if not result.passed]
    if failing:
        lines = "\n  ".join(result.explain() for result in failing)
        undecided = sum(result.verdict == "undecided" for result in failing)
        of_these = f" ({undecided} undecided, with a value above the limit)" if undecided else ""
        remedy = suggest_remedy(results, load_report(directory).recipe)
        advice = f"\n{remedy}" if remedy else ""
        complain(
            f"{len(failing)} of {len(results)} gates missed{of_these} in {directory}:\n  {lines}{advice}"
        )
        raise typer.Exit(EXIT_GATE_MISSED)


def report(
    directory: Annotated[Path, typer.Argument(help="An export, or a point of a sweep.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, instead of ercsvd_report.html in the directory."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Make the HTML page of a run from its report, without computing anything again."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file):
        from ercsvd_deploy.format.files.atomic_files import write_text_atomically
        from ercsvd_deploy.format.files.manifest import record_reports
        from ercsvd_deploy.pipelines.reporting.html.page import PAGE_FILE, make_page
        from ercsvd_deploy.pipelines.reporting.report.document import load_report

        page = make_page(load_report(directory), directory.absolute())
        file = output or directory / PAGE_FILE
        write_text_atomically(file, page)
        if output is None:
            record_reports(directory, [PAGE_FILE])
        if as_json:
            print_json({"directory": str(directory), "page": str(file)})
        else:
            result_console().print(f"Written to {file}", highlight=False)
