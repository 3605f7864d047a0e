"""`examples/without_torchvision`: one module of transformers is replaced where torchvision is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples/without_torchvision"
NEEDS_TORCHVISION = "transformers.models.pixtral.image_processing_pixtral"
# Hides torchvision on a machine that has it.
HIDE = "import sys; sys.modules['torchvision'] = None; sys.path_importer_cache.clear()\n"


def run_python(code: str, *folders: Path) -> str:
    """Return what a fresh interpreter prints that has `folders` on PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout
