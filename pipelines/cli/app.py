"""The command line: `ercsvd validate`, `plan`, `run`, `status`, `clean`, `eval`, `verify` and more.

Exit codes and options that all commands share are in `command_line`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ercsvd_deploy import __version__
from ercsvd_deploy.pipelines.cli.check import Junit, check, end_with_gates
from ercsvd_deploy.pipelines.cli.host import bench_host
from ercsvd_deploy.pipelines.cli.options import (
    EXIT_FAILED,
    AsJson,
    Debug,
    Device,
    Output,
    Overrides,
    RecipePath,
    complain,
    failures_explained,
    find_device,
    print_json,
    quiet_libraries,
    result_console,
    warn,
)
from ercsvd_deploy.pipelines.cli.report import report_page
from ercsvd_deploy.pipelines.cli.sweep import sweep
from ercsvd_deploy.recipe.load import check_files, load_recipe, recipe_json_schema

app = typer.Typer(
    name="ercsvd",
    help="Compress a language model by a recipe, into a directory that stock vLLM serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def validate(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Check a recipe and the files it names, without loading anything."""
    with failures_explained(debug=debug):
        loaded = load_recipe(recipe, overrides or ())
        check_files(loaded)
        if as_json:
            print_json({"recipe": str(recipe), "valid": True})
        else:
            result_console().print(f"{recipe}: valid", highlight=False)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a run makes and needs, from the model's config alone; fails if it cannot work."""
    with failures_explained(debug=debug):
        loaded = load_recipe(recipe, overrides or (), output)
        with quiet_libraries():
            from ercsvd_deploy.pipelines.planning.plan import make_plan

            made = make_plan(loaded, device=find_device(device)).with_kernels()
        if as_json:
            print_json(made.as_json())
        else:
            from ercsvd_deploy.pipelines.reporting.plan_tables import render

            result_console().print(render(made))
        for shortage in made.estimate.shortages:
            warn(f"this machine may not suffice: {shortage}")
        for problem in made.estimate.problems:
            complain(problem)
        if made.estimate.problems:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    device: Device = None,
    junit: Junit = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress, evaluate and export; prints what was gained and lost."""
    with failures_explained(debug=debug):
        loaded = load_recipe(recipe, overrides or (), output)
        with quiet_libraries():
            from ercsvd_deploy.pipelines.cli.progress import on_terminal
            from ercsvd_deploy.pipelines.flow import run_recipe
            from ercsvd_deploy.pipelines.reporting.document import render

            report, directory = run_recipe(
                loaded, device=find_device(device), progress=on_terminal(Console(stderr=True))
            )
        if as_json:
            print_json(report.as_json() | {"directory": str(directory)})
        else:
            console = result_console()
            console.print(render(report))
            console.print(
                f"\nWritten to {directory}. Serve it with:  vllm serve {directory}", highlight=False
            )
        end_with_gates(report.gates, directory, junit)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory of a model, original or compressed, or a hub id.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="[NAME=]FILE", help="Held-out text for perplexity.")
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--questions", metavar="[NAME=]FILE", help="Questions about pictures, with their answers."
        ),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each window; default 2048, or what the model has.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Windows per text, questions per set.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="lm-eval documents per task.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on texts, exact answers about pictures, and lm-eval tasks where it is installed."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.pipelines.judging.evaluate import evaluate_model

        with quiet_libraries():
            from ercsvd_deploy.pipelines.cli.progress import on_terminal

            found = evaluate_model(
                model,
                texts=text or [],
                questions=questions or [],
                sequence_length=sequence_length,
                max_sequences=max_sequences,
                tasks=[task.strip() for task in tasks.split(",")] if tasks else [],
                limit=limit,
                device=find_device(device),
                progress=on_terminal(Console(stderr=True)),
            )
        if as_json:
            print_json(found)
            return
        table = Table(title=str(model), title_justify="left")
        for column in ("what", "value"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for name, value in found["perplexity"].items():
            table.add_row(f"perplexity, {name}", f"{value:.3f}")
        for name, value in found["exact_match"].items():
            asked = f"{found['num_questions'][name]} questions"
            table.add_row(f"exact match, {name}, {asked}", f"{100 * value:.1f} %")
        for task, metrics in found["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(f"{task}, {metric}", f"{value:.4f}")
        result_console().print(table)
        for note in found["notes"]:
            result_console().print(f"warning: {note}", style="yellow", highlight=False, markup=False)


@app.command("import-llava")
def import_llava(
    source: Annotated[
        str, typer.Argument(help="Directory or hub id of a LLaVA checkpoint in its authors' format.")
    ],
    target: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of the CLIP vision tower, instead of what the checkpoint names."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Convert a LLaVA checkpoint to the layout that recipes, transformers and vLLM read."""
    with failures_explained(debug=debug):
        with quiet_libraries():
            from dataclasses import asdict

            from ercsvd_deploy.pipelines.importing.llava.convert import import_llava as convert

            imported = convert(source, target, vision_tower=vision_tower)
        if as_json:
            print_json(asdict(imported) | {"directory": str(imported.directory)})
        else:
            result_console().print(
                f"Written to {imported.directory}: {imported.model_type}, "
                f"{imported.parameters:,} parameters, {imported.num_bytes:,} bytes; "
                f"vision tower: {imported.vision_tower}; chat template: {imported.conversation}",
                highlight=False,
            )


@app.command()
def status(
    output: Annotated[Path, typer.Argument(help="The directory a recipe writes.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell whether an output is finished, running or interrupted, and what of it is done."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.pipelines.state.status import output_status

        found = output_status(output)
        if as_json:
            print_json(asdict(found))
            return
        absent = "there, but not an export of this tool" if output.exists() else "not there"
        word = "running" if found.running else "finished" if found.finished else absent
        lines = [f"{output}: {word}"]
        lines += [
            f"  {stage.name}: {stage.pieces} pieces, {stage.num_bytes:,} bytes" for stage in found.stages
        ]
        if not found.running:
            lines.append(
                "an unfinished run can be continued by the same command, or removed by `ercsvd clean`"
                if found.stages
                else "nothing of an unfinished run is there"
            )
        result_console().print("\n".join(lines), highlight=False, markup=False)


@app.command()
def clean(
    output: Annotated[Path, typer.Argument(help="The directory a recipe writes.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Remove what an unfinished run left; a finished export stays."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.pipelines.state.lock import remove_unfinished, work_path

        was_there = remove_unfinished(output.absolute())
        said = f"removed {work_path(output)}" if was_there else f"{output}: nothing to remove"
        result_console().print(said, highlight=False, markup=False)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="An export.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every tensor and file of an export with the checksums it was written with."""
    with failures_explained(debug=debug):
        from ercsvd_deploy.format.manifest import verify_export
        from ercsvd_deploy.pipelines.reporting.files import REPORT_FILES

        found = verify_export(directory, unlisted=REPORT_FILES)
        if as_json:
            print_json(asdict(found) | {"directory": str(directory), "sound": not found.problems})
        elif not found.problems:
            said = (
                f"{directory}: sound; {found.num_tensors} tensors and {found.num_files} files are as written"
            )
            result_console().print(f"{said} by version {found.written_by}", highlight=False, markup=False)
        if found.problems:
            listed = "\n  ".join(found.problems[:40])
            more = f"\n  and {len(found.problems) - 40} more" if found.problems[40:] else ""
            complain(
                f"{directory} is not what was exported ({len(found.problems)} problems):\n  {listed}{more}\n"
                "copy or export it again"
            )
            raise typer.Exit(EXIT_FAILED)


app.command("check")(check)
app.command("sweep")(sweep)
app.command("bench-host")(bench_host)
app.command("report")(report_page)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    print_json(recipe_json_schema())


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"ercsvd-deploy {__version__}\n")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
