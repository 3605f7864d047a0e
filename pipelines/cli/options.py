"""What all commands share: options, output for people and machines, and failures as messages and exit codes.

Exit codes: 0 done; 1 the work failed; 2 the command line or the recipe is wrong; 3 the work is done, but a
quality gate was missed. A failure is one message on standard error that says what is wrong, where, and
what to do; `--debug` adds the traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ercsvd_deploy.pipelines.reporting.document import finite
from ercsvd_deploy.recipe.load import RecipeError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE_MISSED = 3

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, e.g. stages.0.factorize.beta=0.1."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory to write, instead of the recipe's export.path."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; default: a GPU if any.")]


@contextmanager
def failures_explained(*, debug: bool) -> Iterator[None]:
    """Turn an error into one message and an exit code."""
    try:
        yield
    except typer.Exit:  # is a RuntimeError
        raise
    except RecipeError as error:
        if debug:
            raise
        complain(str(error))
        raise typer.Exit(EXIT_USAGE) from error
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug:
            raise
        complain(_explain_with_notes(error))
        raise typer.Exit(EXIT_FAILED) from error
    except KeyboardInterrupt as interrupt:
        complain("\n".join(["interrupted", *getattr(interrupt, "__notes__", ())]))
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        complain(
            f"{type(error).__name__}: {error}. This should have had a better message; --debug shows where"
        )
        raise typer.Exit(EXIT_FAILED) from error


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory: lower calibration.num_samples or sequence_length"
    return str(error) or type(error).__name__


def _explain_with_notes(error: BaseException) -> str:
    """Return the message, and on lines of their own what was noted on the way up."""
    return "\n".join([_explain(error), *getattr(error, "__notes__", ())])


def complain(message: str) -> None:
    """Print an error for people."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"error: {message}", style="red"
    )


def warn(message: str) -> None:
    """Print a warning for people."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
        f"warning: {message}", style="yellow"
    )


def print_json(value: Any) -> None:
    """Print a result for machines; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def find_device(name: str | None) -> Any:
    """Return a torch device that is there, or None for the default.

    Raises:
        ValueError: no such device.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' start-up chatter out of the output; their errors still come through."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch  # noqa: F401 - sets up its loggers on import, so their levels are set after it

    for name in ("torch.utils._pytree", "torchao", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def result_console() -> Console:
    """Return a console for results; a pipe or a file gets lines wide enough for every table.

    Without markup: names that users and files chose may have brackets in them.
    """
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=140, markup=False)
