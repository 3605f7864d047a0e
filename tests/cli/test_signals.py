"""SIGTERM and Ctrl-C: one message, an exit code, a work directory that the next run goes on from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.recipe_runs import RecipeWriter, factorize, invoke, start

pytestmark = pytest.mark.usefixtures("heeded_interrupts")

# A command that does one thing that takes long and that Python cannot interrupt, like a decomposition.
# That it has begun is told from beside it: just before, a signal would still be heeded.
UNINTERRUPTIBLE = """
import hashlib, threading
from ercsvd_deploy.pipelines.cli.failures import command
with command():
    threading.Timer(0.5, print, ["begins"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


# What native libraries do, safetensors among them: an exception in the Python that they
# call becomes one of their own.
MISTAKEN = """
import os, signal, time
import typer
from ercsvd_deploy.pipelines.cli.failures import command
app = typer.Typer()
@app.command()
def run():
    with command():
        try:
            os.kill(os.getpid(), signal.{name})
            time.sleep(60)
        except BaseException:
            error = ValueError("could not determine the shape of object")
            error.add_note("what is finished is kept")
            raise error from None
app()
"""


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "word", "code"),
    [("SIGTERM", "terminated", 143), ("SIGINT", "interrupted", 130), ("SIGHUP", "terminated", 129)],
)
def test_a_signal_that_a_library_takes_for_an_error_of_its_own(name: str, word: str, code: int) -> None:
    with started("-c", MISTAKEN.format(name=name)) as process:
        output, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert (output, error) == ("", f"error: {word}; what is finished is kept\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word", "code"),
    [
        (signal.SIGTERM, "terminated", 143),
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGHUP, "terminated", 129),
    ],
)
def test_a_run_that_is_told_to_end_can_be_resumed(
    number: signal.Signals,
    word: str,
    code: int,
    write_recipe: RecipeWriter,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(factorize(method="erc_svd"))
    process = start("run", recipe, "-q")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.work/factorize/*.entry.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert output == ""
    assert error.startswith(f"error: {word}; what is finished is kept: the same command goes on")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    _, status, _ = invoke("status", tmp_path / "out", "--json")
    assert not json.loads(status)["running"]
    assert json.loads(status)["stages"]
    found, output, _ = invoke("run", recipe, "--json")
    assert found == 0
    assert any("are used" in note for note in json.loads(output)["resumed"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_the_second_signal_ends_the_process_at_once(numbers: tuple[signal.Signals, signal.Signals]) -> None:
    with started("-c", UNINTERRUPTIBLE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        process.send_signal(numbers[0])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(numbers[1])
        assert process.wait(timeout=10) == 128 + numbers[1]


def test_signals_that_the_caller_ignores_stay_ignored() -> None:
    """As for a job in a shell's background, which Ctrl-C must not reach."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + UNINTERRUPTIBLE
    with started("-c", code.replace("10**9", "4 * 10**6")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
