"""The results of a sweep's points, and of the sweep as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ercsvd_deploy.pipelines.judging.gates import GateResult

DENSE = "dense"  # the name of the point that is the original


@dataclass(frozen=True)
class PointResult:
    """One model of the sweep."""

    name: str
    num_bytes: int
    bits_per_weight: float
    perplexity: dict[str, float]
    exact_match: dict[str, float]
    gates: list[GateResult] = field(default_factory=list)
    recipe: dict[str, Any] | None = None  # None: the original
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no gate was missed."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; the original is the first point.

    Attributes:
        points: Results of the points that have finished.
        failures: Point -> why it has no result.
        front: Text -> names of the points that no other beats.
        picked: The best point's name; None if none was to be picked, none fits, or points are missing.
        why: The reason for the pick, or why there is none.
        gates_for_the_export: Names of gates that need the export, so that a sweep cannot judge them.
        unfinished: Names of the points that have not been computed yet.
    """

    points: list[PointResult]
    failures: dict[str, str]
    front: dict[str, list[str]]
    picked: str | None
    why: str
    gates_for_the_export: list[str]
    unfinished: list[str]

    def point(self, name: str) -> PointResult:
        """Return a point by its name."""
        return next(point for point in self.points if point.name == name)
