"""`ercsvd report`: make the HTML page of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ercsvd_deploy.pipelines.cli.options import (
    AsJson,
    Debug,
    failures_explained,
    print_json,
    result_console,
)


def report_page(
    directory: Annotated[Path, typer.Argument(help="An export, or a point of a sweep.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, instead of ercsvd_report.html in the directory."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make the HTML page of a run from its report, without computing anything again."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.format.atomic_files import write_text_atomically
        from ercsvd_deploy.pipelines.reporting.html.page import PAGE_FILE, make_page
        from ercsvd_deploy.pipelines.reporting.schema import load_report

        page = make_page(load_report(directory), directory.absolute())
        file = output or directory / PAGE_FILE
        write_text_atomically(file, page)
        if as_json:
            print_json({"directory": str(directory), "page": str(file)})
        else:
            result_console().print(f"Written to {file}", highlight=False)
