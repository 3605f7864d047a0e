"""The files that describe a run beside its export: the JSON report, the HTML page and the model card."""

from __future__ import annotations

from pathlib import Path

from ercsvd_deploy.format.files.atomic_files import (
    remove_partial_files,
    write_json_atomically,
    write_text_atomically,
)
from ercsvd_deploy.format.files.manifest import (
    REPORT_SUMS_FILE,
    announce_reports,
    record_reports,
    weights_digest,
)
from ercsvd_deploy.pipelines.reporting.card import make_card
from ercsvd_deploy.pipelines.reporting.html.page import PAGE_NEEDS, can_make_page, make_page
from ercsvd_deploy.pipelines.reporting.report.document import Report, parse_report
from ercsvd_deploy.pipelines.stages.export import CARD_FILE, PAGE_FILE, REPORT_FILE, REPORT_FILES

__all__ = ["REPORT_FILES", "write_report_files"]


def write_report_files(directory: Path, report: Report, target: Path | None = None) -> list[str]:
    """Write report, page and model card into a directory, replacing existing ones.

    Args:
        directory: Where to write.
        report: The report to write.
        target: The directory's final path, if it will be moved.

    Returns:
        A line for each file that could not be made, with its remedy; a missing page does not fail the run.

    Raises:
        OSError: a file cannot be written.
    """
    for name in REPORT_FILES:
        remove_partial_files(directory, name)
    report.weights_sha256 = weights_digest(directory) or report.weights_sha256
    announce_reports(directory, REPORT_FILES - {REPORT_SUMS_FILE})
    problems = _write(directory, report, target or directory)
    record_reports(directory, REPORT_FILES - {REPORT_SUMS_FILE})
    return problems


def _write(directory: Path, report: Report, final_path: Path) -> list[str]:
    values = report.as_json()
    write_json_atomically(directory / REPORT_FILE, values)
    parsed = parse_report(values)  # as `ercsvd report` reads it, so that both make the same page
    (directory / PAGE_FILE).unlink(missing_ok=True)  # an older page describes another model
    write_text_atomically(directory / CARD_FILE, make_card(parsed, directory, final_path))
    again = f"ercsvd report {final_path}"
    if not can_make_page():
        return [f"no {PAGE_FILE} was written, for want of matplotlib and jinja2: {PAGE_NEEDS}, then {again}"]
    try:
        page = make_page(parsed, final_path)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, ImportError) as error:
        return [f"no {PAGE_FILE} was written ({type(error).__name__}: {error}); `{again} --debug` shows why"]
    write_text_atomically(directory / PAGE_FILE, page)
    return []
