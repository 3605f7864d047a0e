"""`make demo` without its computing: the completion is shown whatever the gates say, and they decide."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from ercsvd_deploy.exporters.vllm.compatibility import TESTED_RELEASES
from ercsvd_deploy.installation import SERVED_BY

REPOSITORY = Path(__file__).parents[2]
# What vLLM 0.32 writes when its engine cannot start: the engine's process first, then the server's.
LOG = """\
INFO 11-26 02:04:40 [importing.py:44] Triton is not installed
(APIServer pid=10) INFO 11-26 02:04:41 [api_server.py:1351] vLLM API server version 0.32.0
(EngineCore pid=11) ERROR 11-26 02:04:50 [core.py:1165] EngineCore failed to start.
(EngineCore pid=11) ERROR 11-26 02:04:50 [core.py:1165] Traceback (most recent call last):
(EngineCore pid=11) ERROR 11-26 02:04:50 [core.py:1165]   File "core.py", line 1139, in run_engine_core
(EngineCore pid=11) ERROR 11-26 02:04:50 [core.py:1165]     raise ValueError("no")
(EngineCore pid=11) ERROR 11-26 02:04:50 [core.py:1165] AttributeError: '_C' object has no attribute 'gemm'
(APIServer pid=10) Traceback (most recent call last):
(APIServer pid=10)   File "api_server.py", line 1459, in <module>
(APIServer pid=10) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def demo() -> ModuleType:
    """Return examples/serve_and_ask.py as a module."""
    spec = importlib.util.spec_from_file_location("serve_and_ask", REPOSITORY / "examples/serve_and_ask.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(target: str, folder: Path, *, run: int, ask: int) -> subprocess.CompletedProcess[str]:
    """Make a target with commands that only tell what they were called with, and exit with these codes."""
    commands = folder / "bin"
    commands.mkdir()
    for name, code in (("ercsvd", run), ("python", ask)):
        command = commands / name
        command.write_text(f'#!/bin/sh\necho "called: {name} $@"\nexit {code}\n')
        command.chmod(0o755)
    ready = folder / "ready"
    ready.touch()
    return subprocess.run(
        ["make", "--file", str(REPOSITORY / "Makefile"), target, f"BIN={commands}", f"READY={ready}"],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "demo-llava"])
@pytest.mark.parametrize(
    ("run", "ask", "is_asked", "code"),
    [(0, 0, True, 0), (3, 0, True, 3), (1, 0, False, 1), (2, 0, False, 2), (0, 1, True, 1), (3, 1, True, 1)],
    ids=["passes", "gate missed", "run fails", "recipe refused", "vLLM fails", "both"],
)
def test_a_missed_gate_does_not_hide_the_completion(
    target: str, run: int, ask: int, is_asked: bool, code: int, tmp_path: Path
) -> None:
    made = make(target, tmp_path, run=run, ask=ask)
    recipe = "recipes/demo.yaml" if target == "demo" else "recipes/demo-llava.yaml"
    assert f"called: ercsvd run {recipe}\n" in made.stdout
    assert ("called: python examples/serve_and_ask.py out/" in made.stdout) == is_asked
    assert ("--question What color is the circle?" in made.stdout) == (is_asked and target == "demo-llava")
    if code == 0:
        assert made.returncode == 0, made.stderr
    else:
        assert made.returncode != 0
        assert f"Error {code}" in made.stderr
    assert ("A gate was missed" in made.stderr) == (code == 3)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_real_model_is_made_first_and_asked_through_the_chat_endpoint(tmp_path: Path) -> None:
    made = make("demo-real", tmp_path, run=0, ask=0)
    assert [line for line in made.stdout.splitlines() if line.startswith("called: ")] == [
        "called: python examples/real_model.py",
        "called: ercsvd run recipes/demo-real.yaml",
        "called: python examples/serve_and_ask.py out/SmolLM2-135M-Instruct-int4 "
        "--question What is the capital of France?",
    ]


def test_the_exception_of_the_process_that_failed_first_is_told(demo: ModuleType) -> None:
    assert demo.first_exception(LOG) == "AttributeError: '_C' object has no attribute 'gemm'"
    assert demo.first_exception("INFO: all is well\nValueError: in no traceback\n") is None
    plain = 'Traceback (most recent call last):\n  File "a.py", line 1\ntorch.cuda.OutOfMemoryError: full\n'
    assert demo.first_exception(plain) == "torch.cuda.OutOfMemoryError: full"


def test_a_server_that_does_not_start_leaves_its_log(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(_model: Path, _port: int, log: Path) -> subprocess.Popen[bytes]:
        log.write_text(LOG)
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], start_new_session=True)

    monkeypatch.setattr(demo, "start_server", start)
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["serve_and_ask.py", "out/model"])
    assert demo.main() == 1
    told = capsys.readouterr()
    assert "error: the server did not start: AttributeError: '_C' object has no attribute 'gemm'" in told.err
    [log] = tmp_path.glob("*/server.log")
    assert log.read_text() == LOG
    assert str(log) in told.err


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--prompt", "one"], "prompt and completion:\n\none and model\n"),
        (["--question", "Who?"], "Who?\n\n/v1/chat/completions was asked Who?\n"),
    ],
    ids=["completion", "chat"],
)
def test_a_server_that_answers_leaves_nothing(
    demo: ModuleType,
    arguments: list[str],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answering = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200), self.end_headers()
        choice = {"text": " and " + asked["model"]}
        if "messages" in asked:
            content = asked["messages"][0]["content"]  # a string, as chat templates without pictures expect
            choice = {"message": {"content": self.path + " was asked " + content}}
        self.wfile.write(json.dumps({"choices": [choice]}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    started: list[subprocess.Popen[bytes]] = []

    def start(_model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            command = [sys.executable, "-c", answering, str(port)]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
        return started[0]

    monkeypatch.setattr(demo, "start_server", start)
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["serve_and_ask.py", "out/model", *arguments])
    assert demo.main() == 0
    assert capsys.readouterr().out.endswith(printed)
    assert started[0].wait(timeout=10) != 0
    assert not list(tmp_path.iterdir())


def test_the_matrix_serves_with_every_release_that_counts_as_tested() -> None:
    [line] = re.findall(r"^VLLM_RELEASES \?= (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert tuple(line.split()) == TESTED_RELEASES


def test_the_oldest_tested_release_is_the_one_asked_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["serve"] == [SERVED_BY]
    assert f"{SERVED_BY}.0" == f"vllm>={TESTED_RELEASES[0]}"
