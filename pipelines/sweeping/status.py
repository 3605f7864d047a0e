"""What is known of a sweep: how many points have finished, failed, or are still to be computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ercsvd_deploy.pipelines.state.lock import is_in_use
from ercsvd_deploy.pipelines.sweeping.file import RESULTS_FILE, WORK


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        finished: Names of the points that have a result.
        failed: Point -> why it has none.
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
    """Look at a directory without changing anything; None if it is no sweep's output."""
    try:
        found: Any = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("points"), list):
        return None
    points = [point for point in found["points"] if isinstance(point, dict)]
    return SweepStatus(
        finished=[str(point.get("name")) for point in points if point.get("recipe") is not None],
        failed=dict(found.get("failures") or {}),
        unfinished=list(found.get("unfinished") or ()),
        picked=found.get("picked"),
        running=is_in_use(output.absolute() / WORK),
    )
