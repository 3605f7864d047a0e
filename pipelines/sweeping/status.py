"""The status of a sweep: which points have finished, failed or are still to be computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ercsvd_deploy.pipelines.state.lock import is_in_use
from ercsvd_deploy.pipelines.sweeping.file import RESULTS_FILE, WORK


@dataclass(frozen=True)
class SweepStatus:
    """The status of a sweep.

    Attributes:
        finished: Names of the points that have a result.
        failed: Point name -> why it has no result.
        unfinished: Names of the points that were not computed when the file was written.
        picked: The best point; None if none has been picked.
        running: Whether it is running now.
    """

    finished: list[str]
    failed: dict[str, str]
    unfinished: list[str]
    picked: str | None
    running: bool


def sweep_status(output: Path) -> SweepStatus | None:
    """Return a sweep's status without changing anything; None if the directory is not a sweep's output."""
    try:
        results: Any = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(results, dict) or not isinstance(results.get("points"), list):
        return None
    points = [point for point in results["points"] if isinstance(point, dict)]
    return SweepStatus(
        finished=[str(point.get("name")) for point in points if point.get("recipe") is not None],
        failed=dict(results.get("failures") or {}),
        unfinished=list(results.get("unfinished") or ()),
        picked=results.get("picked"),
        running=is_in_use(output.absolute() / WORK),
    )
