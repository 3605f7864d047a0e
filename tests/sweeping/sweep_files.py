"""Sweep files that vary the ratio of a recipe's factorize stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RATIO = "stages.0.factorize.compression_ratio"


def written(tmp_path: Path, recipe: Path, **entries: Any) -> Path:
    """Write a sweep over a recipe; return its file."""
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": str(recipe), **entries}))
    return path
