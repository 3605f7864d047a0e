"""`examples/without_torchvision`: one module of transformers is replaced where torchvision is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples/without_torchvision"
TWIN_OF = "transformers.models.pixtral.image_processing_pixtral"
HIDE_TORCHVISION = "import sys; sys.modules['torchvision'] = None; "
ASK_THE_FINDER = (
    "import json, sys; finder = next(f for f in sys.meta_path if type(f).__name__ == 'PilTwin'); "
    "print(json.dumps([finder.find_spec(name) is not None for name in sys.argv[1:]]))"
)


def run_python(code: str, *folders: Path, arguments: tuple[str, ...] = ()) -> Any:
    """Return what a fresh interpreter with `folders` on PYTHONPATH prints, which is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.mark.vllm
def test_the_function_that_vllm_imports_is_there() -> None:
    call = "[twin.__name__, twin._num_image_tokens((33, 16), 16)]"
    code = f"{HIDE_TORCHVISION} import json, {TWIN_OF} as twin; print(json.dumps({call}))"
    assert run_python(code, FOLDER) == [TWIN_OF, [3, 1]]


def test_other_modules_are_left_alone() -> None:
    names = (TWIN_OF, "transformers.models.pixtral.modeling_pixtral", "json")
    assert run_python(HIDE_TORCHVISION + ASK_THE_FINDER, FOLDER, arguments=names) == [True, False, False]


def test_nothing_happens_where_torchvision_is_installed(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").touch()
    assert run_python(ASK_THE_FINDER, FOLDER, tmp_path, arguments=(TWIN_OF,)) == [False]


def test_starting_python_imports_nothing_heavy() -> None:
    code = "import json, sys; print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))"
    asked = ("torch", "torchvision", "transformers", "numpy", "PIL", "sitecustomize")
    assert run_python(code, FOLDER, arguments=asked) == ["sitecustomize"]


def test_a_sitecustomize_that_it_hides_runs_once(tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import sys\nsys.started = [*getattr(sys, 'started', []), 1]\n")
    code = "import json, sys; print(json.dumps(sys.started))"
    assert run_python(code, FOLDER, other) == [1]
    assert run_python(code, copy, FOLDER, other) == [1]
    assert run_python(code, other, FOLDER) == [1]
