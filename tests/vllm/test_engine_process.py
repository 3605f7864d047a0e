"""vLLM's process: its answer, its log, and that nothing of it outlives it. Stand-ins play its part."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ercsvd_deploy.exporters.vllm.engines import process as engine_process
from ercsvd_deploy.exporters.vllm.engines.process import EngineError, ServedPrompt, score_with_vllm

REPOSITORY = Path(__file__).parents[2]
ANSWERING = """
import json, sys
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
for prompt in request["prompts"]:
    prompt["images"] = [list(Path(file).read_bytes()[:4]) for file in prompt["images"]]
print("said by the engine")
Path(sys.argv[2]).write_text(json.dumps(request))
"""
FAILING = """
import sys
print("(EngineCore pid=7) ERROR 01-31 12:00:00 [core.py:1] EngineCore failed to start.", file=sys.stderr)
for line in ("Traceback (most recent call last):", '  File "a.py", line 1, in f', "ValueError: the cause"):
    print("(EngineCore pid=7) ERROR 01-31 12:00:00 [core.py:1] " + line, file=sys.stderr)
raise RuntimeError("Engine core initialization failed. See root cause above.")
"""
KILLED = "import os, signal; print('about to go', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
WAITING = "import time; print('still loading', flush=True); time.sleep(600)"
LEAVING_A_WORKER = """
import subprocess, sys
from pathlib import Path
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[2]).write_text(str(worker.pid))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what runs a program in place of vLLM."""

    def run_it(program: str, *prompts: ServedPrompt, timeout: float = 60.0) -> Any:
        (tmp_path / "stand_in.py").write_text(program)
        monkeypatch.setattr(engine_process, "_SCORER", "stand_in")
        monkeypatch.setattr(engine_process, "_TIMEOUT", timeout)
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return score_with_vllm({"a": 1}, prompts, 3, environment=environment, log=tmp_path / "x.vllm.log")

    return run_it


def failure_of(run: Any, program: str, **options: Any) -> EngineError:
    with pytest.raises(EngineError) as raised:
        run(program, **options)
    return raised.value


def test_the_request_arrives_and_the_answer_comes_back(run: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (3, 2), (255, 0, 7))
    answer = run(ANSWERING, ServedPrompt([1, 2]), ServedPrompt((3, 4), [picture, picture]))
    assert answer == {
        "engine": {"a": 1},
        "num_decoded": 3,
        "prompts": [
            {"tokens": [1, 2], "images": []},
            {"tokens": [3, 4], "images": [list(b"\x89PNG")] * 2},
        ],
    }
    assert (tmp_path / "x.vllm.log").read_text() == "said by the engine\n"


def test_the_first_failure_is_found_in_this_log_alone(run: Any, tmp_path: Path) -> None:
    log = tmp_path / "x.vllm.log"
    log.write_text("Traceback (most recent call last):\nKeyError: of an earlier size\n")
    error = failure_of(run, FAILING)
    assert (error.failure.process, error.failure.exception) == ("EngineCore", "ValueError: the cause")
    assert str(error) == "vLLM failed: EngineCore: ValueError: the cause"
    assert 'File "a.py", line 1, in f' in error.failure.excerpt
    text = log.read_text()
    assert text.index("KeyError") < text.index("ValueError") < text.index("RuntimeError")


def test_a_killed_process_is_told_by_its_signal(run: Any) -> None:
    failure = failure_of(run, KILLED).failure
    assert "ended by signal 9 (SIGKILL), as the system does when memory runs out" in failure.exception
    assert failure.excerpt == "about to go"


def test_a_deadline(run: Any) -> None:
    start = time.monotonic()
    failure = failure_of(run, WAITING, timeout=2.0).failure
    assert time.monotonic() - start < 30
    assert failure.exception.startswith("no answer within 0 minutes")
    assert failure.excerpt == "still loading"


def test_no_worker_outlives_it(run: Any) -> None:
    worker = run(LEAVING_A_WORKER)
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_vllm_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import a_library_that_is_not_there\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, REPOSITORY)))}
    with pytest.raises(EngineError) as raised:
        score_with_vllm({}, [], 3, environment=environment, log=tmp_path / "log")
    expected = "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    assert raised.value.failure.exception == expected


def test_the_process_is_this_interpreters(run: Any) -> None:
    program = "import json, sys; open(sys.argv[2], 'w').write(json.dumps(sys.executable))"
    assert run(program) == sys.executable
