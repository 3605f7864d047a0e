"""Commands that take a model, compressed or not: `eval`, `import-llava`."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ercsvd_deploy.pipelines.cli.failures import command
from ercsvd_deploy.pipelines.cli.messages import print_json, result_console
from ercsvd_deploy.pipelines.cli.options import AsJson, Debug, Device, LogFile, Quiet, Verbose

if TYPE_CHECKING:
    from rich.table import Table


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
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Measure perplexity on texts, exact answers about pictures, and lm-eval tasks where it is installed."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file) as progress:
        from ercsvd_deploy.pipelines.inputs.model import find_device
        from ercsvd_deploy.pipelines.judging.evaluate import evaluate_model

        results = evaluate_model(
            model,
            texts=text or [],
            questions=questions or [],
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            tasks=[task.strip() for task in tasks.split(",")] if tasks else [],
            limit=limit,
            device=find_device(device),
            progress=progress,
        )
        if as_json:
            print_json(results)
            return
        result_console().print(_evaluation_table(results))
        for note in results["notes"]:
            result_console().print(f"warning: {note}", style="yellow", highlight=False, markup=False)


def _evaluation_table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=results["model"], title_justify="left")
    for column in ("what", "value", "95 % interval", "measured on"):
        table.add_column(column, justify="left" if column == "what" else "right")
    estimates = results["estimates"]
    for name, estimate in estimates["perplexity"].items():
        table.add_row(f"Perplexity, {name}", *_estimate_cells(estimate, 1, 3, ""))
    for name, estimate in estimates["exact_match"].items():
        table.add_row(f"Exact match, {name}", *_estimate_cells(estimate, 100, 1, " %"))
    for task, metrics in estimates["tasks"].items():
        for metric, estimate in metrics.items():
            table.add_row(f"{task}, {metric}", *_estimate_cells(estimate, 1, 4, ""))
    return table


def _estimate_cells(estimate: dict[str, Any], scale: float, digits: int, unit: str) -> tuple[str, str, str]:
    """Return value, interval and count of an estimate."""
    value, low, high = (
        None if estimate[key] is None or not isfinite(estimate[key]) else scale * estimate[key]
        for key in ("value", "low", "high")
    )
    interval = "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}{unit}"
    value_cell = "not finite" if value is None else f"{value:.{digits}f}{unit}"
    return value_cell, interval, f"{estimate['count']:,} {estimate['unit']}"


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
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    debug: Debug = False,
) -> None:
    """Convert a LLaVA checkpoint to the layout that recipes, transformers and vLLM read."""
    with command(debug=debug, verbose=verbose, quiet=quiet, log_file=log_file):
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
