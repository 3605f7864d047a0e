"""The command line: `ercsvd validate`, `plan`, `run`, `status`, `clean`, `eval`, `verify` and more.

Each group of commands has its own file. A command imports what it needs only when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ercsvd_deploy import __version__
from ercsvd_deploy.pipelines.cli.failures import command
from ercsvd_deploy.pipelines.cli.messages import print_json
from ercsvd_deploy.pipelines.cli.models import evaluate, import_llava
from ercsvd_deploy.pipelines.cli.outputs import check, clean, report, status, verify
from ercsvd_deploy.pipelines.cli.ready_recipes import recipes
from ercsvd_deploy.pipelines.cli.recipes import plan, run, validate
from ercsvd_deploy.pipelines.cli.sweeps import sweep

app = typer.Typer(
    name="ercsvd",
    help="Compress a language model by a recipe, into a directory that stock vLLM serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "validate": validate,
    "plan": plan,
    "run": run,
    "sweep": sweep,
    "recipes": recipes,
    "eval": evaluate,
    "import-llava": import_llava,
    "status": status,
    "clean": clean,
    "verify": verify,
    "check": check,
    "report": report,
}
for command_name, body in COMMANDS.items():
    app.command(command_name)(body)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    with command():
        from ercsvd_deploy.recipe.reference import recipe_json_schema

        print_json(recipe_json_schema())


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"ercsvd-deploy {__version__}\n")


def _print_version(value: bool) -> None:
    if value:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress a language model by a recipe, into a directory that stock vLLM serves."""


def main() -> None:
    """Run the command line."""
    app()
