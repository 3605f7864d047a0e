"""Levels, the log file, and that no warning is lost: what a command tells, where, and under which option."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.pipelines.cli.failures import command
from ercsvd_deploy.pipelines.cli.messages import complain
from tests.recipe_runs import RecipeWriter, factorize, invoke

OURS = logging.getLogger("ercsvd_deploy.pipelines.anything")
THEIRS = logging.getLogger("some_library")


def tell_everything() -> None:
    for logger, whose in ((OURS, "ours"), (THEIRS, "theirs")):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, "%s %s", whose, logging.getLevelName(level))
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # also when it comes from the same line again
        warnings.warn("of Python", UserWarning, stacklevel=1)


OURS_FROM_INFO = ["ours INFO", "warning: ours WARNING", "error: ours ERROR"]
THEIRS_FROM_WARNING = ["warning: theirs WARNING", "error: theirs ERROR"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [*OURS_FROM_INFO, *THEIRS_FROM_WARNING, "of Python"]),
        ({"verbose": True}, ["ours DEBUG", *OURS_FROM_INFO, *THEIRS_FROM_WARNING, "of Python"]),
        ({"quiet": True}, ["error: ours ERROR", "error: theirs ERROR"]),
    ],
    ids=["default", "verbose", "quiet"],
)
def test_screen_has_what_its_level_says(
    options: dict[str, Any], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with command(**options):
        tell_everything()
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    if expected[-1] == "of Python":
        assert re.fullmatch(r"warning: .*test_messages.py:\d+: UserWarning: of Python", lines.pop())
        expected = expected[:-1]
    assert lines == expected


def fail(**options: Any) -> None:
    with command(**options):
        tell_everything()
        raise ValueError("what went wrong")


@pytest.mark.parametrize("options", [{}, {"verbose": True}, {"quiet": True}], ids=["default", "v", "q"])
def test_log_file_has_everything_with_times_whatever_the_screen_has(
    options: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "deep" / "log.txt"
    for _ in range(2):  # a run that goes on appends
        with pytest.raises(typer.Exit):
            fail(log_file=file, **options)
    lines = file.read_text().splitlines()
    told = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines]
    assert (
        sum(before != after for before, after in zip(lines, told, strict=True)) == len(lines) - 4
    )  # source and an empty one
    for whose, levels in (("ours", ("DEBUG", "INFO", "WARNING", "ERROR")), ("theirs", ("INFO", "ERROR"))):
        for level in levels:
            assert sum(line.endswith(f": {whose} {level}") for line in told) == 2
    assert sum("UserWarning: of Python" in line for line in told) == 2
    assert sum(line.endswith("ERROR   ercsvd_deploy: what went wrong") for line in told) == 2


def test_nothing_of_the_loggers_stays_behind(tmp_path: Path) -> None:
    root, own = logging.getLogger(), logging.getLogger("ercsvd_deploy")
    before = root.handlers[:], root.level, own.level, warnings.showwarning
    with command(verbose=True, log_file=tmp_path / "log"):
        assert root.handlers != before[0]
    assert (root.handlers, root.level, own.level, warnings.showwarning) == before


def test_a_log_file_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    code, output, error = invoke("plan", tmp_path / "recipe.yaml", "--log-file", tmp_path)
    assert code == 1
    assert output == ""
    assert error == f"error: {tmp_path}: Is a directory\n"


def test_verbose_and_quiet_exclude_each_other(tmp_path: Path) -> None:
    code, output, error = invoke("plan", tmp_path / "recipe.yaml", "-v", "-q")
    assert code == 2
    assert output == ""
    assert "exclude each other" in error


def test_brackets_in_messages_are_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    with command():
        complain("[bold]x[/y]")
    assert capsys.readouterr().err == "error: [bold]x[/y]\n"


@pytest.mark.slow
def test_run_tells_its_layers_and_what_it_reuses(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, log = write_recipe(factorize(num_compressed_layers=3)), tmp_path / "log"

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ercsvd_deploy.pipelines.stages.export.write_export", interrupt)
        code, output, error = invoke("run", recipe, "-q", "--log-file", log)
    assert code == 130
    assert output == ""
    assert error.startswith("error: interrupted; what is finished is kept")
    assert error.count("\n") == 1
    told = log.read_text()
    assert re.search(r"INFO .*svd_llm, 1 candidate: 1/4, 0:00:\d\d, about 0:00:\d\d left", told)
    assert re.search(r"DEBUG .*factorize: .*00003 is done", told)

    code, output, error = invoke("run", recipe, "-v")
    assert code == 0
    assert "Written to" in output
    assert re.search(r"factorize: \d+ finished pieces of an earlier run are used", error)
    assert re.search(r"factorize: .* is reused", error)

    code, output, error = invoke("run", recipe, "--force")
    assert code == 0
    assert "svd_llm, 1 candidate: 4/4, 0:00:0" in error
    assert " is done" not in error


def test_warnings_of_a_run_are_shown(
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From whichever library, by Python's way or by logging; a run silences nothing as a whole."""

    def warn_and_load(*arguments: Any, **options: Any) -> Any:
        warnings.warn("by Python's way", UserWarning, stacklevel=1)
        logging.getLogger("transformers.modeling_utils").warning("by logging")
        logging.getLogger("torch").warning("of torch")
        return load_tokenizer(*arguments, **options)

    monkeypatch.setattr("ercsvd_deploy.pipelines.inputs.run_data.load_tokenizer", warn_and_load)
    code, _, error = invoke("run", write_recipe())
    assert code == 0
    for expected in ("UserWarning: by Python's way", "warning: by logging", "warning: of torch"):
        assert expected in error
