"""Detect an output that a run would only write again: the same inputs and stages, and unchanged files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ercsvd_deploy.exporters.vllm.directory.target import is_export
from ercsvd_deploy.format.files.atomic_files import read_json
from ercsvd_deploy.format.files.manifest import ManifestError, is_as_recorded, verify_export

_SURPLUS = "was not part of the export"


def finished_report(target: Path, report_file: str, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the report of an output that a run would only write again; None if the result would differ.

    Args:
        target: The output directory.
        report_file: Name of its report.
        digests: Stage name -> digest of its fingerprint, for every stage of the run.
    """
    if not target.is_dir() or not any(target.iterdir()) or not is_export(target):
        return None
    if not is_as_recorded(target, report_file):
        return None
    report = read_json(target / report_file)
    provenance = report.get("provenance") if isinstance(report, dict) else None
    if not isinstance(provenance, dict) or provenance.get("stages") != dict(digests):
        return None
    try:
        problems = verify_export(target, unlisted=frozenset()).problems
    except ManifestError:
        return None
    changed = [problem for problem in problems if not problem.endswith(_SURPLUS)]
    return None if changed else dict(report)
