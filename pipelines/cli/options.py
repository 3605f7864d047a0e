"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field, e.g. factorize.beta=0.1 or model.dtype=float16.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory to write, instead of the recipe's export.path."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; default: a GPU if any.")]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write the gates' verdicts as JUnit XML.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Run even if the output is finished, and replace what somebody has changed in it; files that no "
        "export has written are kept.",
    ),
]
KeepWork = Annotated[
    bool,
    typer.Option(
        "--keep-work",
        help="Keep the stages' results beside the output, for a next run with another gate or task.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell what is done, and what is reused, layer by layer.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors alone.")]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Append everything that -v tells to a file, with times."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
