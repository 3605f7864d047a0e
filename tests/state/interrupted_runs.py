"""Runs that end in the middle, runs that go on, and what they have written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.files import REPORT_FILES
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import factorize

INT4 = {"quantize": {"bits": 4, "group_size": 32}}
STAGES = (factorize(rank_multiple="auto", num_compressed_layers="auto", method="erc_svd"), INT4)


def hashes(directory: Path) -> dict[str, str]:
    """Return the export's contents; report, page and card hold times or the export's name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in REPORT_FILES
    }


class Stop(Exception):  # noqa: N818 - not an error of the program
    """Ends a run in the middle."""


def stop_after(monkeypatch: pytest.MonkeyPatch, pieces: int) -> Callable[[], int]:
    """Let the run end after so many finished pieces; return a count of those computed."""
    finish = CacheFolder.write
    count = 0

    def counted(self: CacheFolder, piece: str, entry: Any, tensors: Any = None) -> None:
        nonlocal count
        if count == pieces:
            raise Stop
        finish(self, piece, entry, tensors)
        count += 1

    monkeypatch.setattr(CacheFolder, "write", counted)
    return lambda: count


def whole_run(recipe: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[int, list[str]]:
    """Run to the end; return how many pieces were computed, and what was said about earlier ones."""
    with monkeypatch.context() as patched:
        count = stop_after(patched, 10_000)
        report, _ = run_recipe(load_recipe(recipe, overrides))
        return count(), report.resumed


def half_run(recipe: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, *overrides: str) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, pieces)
        with pytest.raises(Stop):
            run_recipe(load_recipe(recipe, overrides))
