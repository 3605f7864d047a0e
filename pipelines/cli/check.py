"""`ercsvd check`: judge a finished run by its gates again, or by another recipe's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ercsvd_deploy.pipelines.cli.options import (
    EXIT_GATE_MISSED,
    AsJson,
    Debug,
    complain,
    failures_explained,
    print_json,
    result_console,
)

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.gates import GateResult

Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write the gates' verdicts as JUnit XML.")
]


def check(
    directory: Annotated[Path, typer.Argument(help="An export.", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Judge by this recipe's gates instead of the export's own."),
    ] = None,
    junit: Junit = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Judge an export's report by gates, without computing anything again."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.pipelines.judging.check import check_export
        from ercsvd_deploy.pipelines.reporting.document import gate_table

        results = check_export(directory, recipe)
        if as_json:
            passed = all(result.passed for result in results)
            gates = [asdict(result) for result in results]
            print_json({"directory": str(directory), "passed": passed, "gates": gates})
        else:
            result_console().print(gate_table(results))
        end_with_gates(results, directory, junit)


def end_with_gates(results: list[GateResult], directory: Path, junit: Path | None) -> None:
    """Write the verdicts where asked, and leave with the exit code of a missed gate if there is one."""
    from ercsvd_deploy.format.atomic_files import write_text_atomically
    from ercsvd_deploy.pipelines.judging.gates import junit_xml

    if junit is not None:
        write_text_atomically(junit, junit_xml(results, str(directory)))
    missed = [result.explain() for result in results if not result.passed]
    if missed:
        lines = "\n  ".join(missed)
        complain(f"{len(missed)} of {len(results)} gates missed in {directory}:\n  {lines}")
        raise typer.Exit(EXIT_GATE_MISSED)
