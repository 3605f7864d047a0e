"""The files in which a run tells of itself: the report for machines, the page, and the model card."""

from __future__ import annotations

from pathlib import Path

from ercsvd_deploy.format.atomic_files import (
    remove_partial_files,
    write_json_atomically,
    write_text_atomically,
)
from ercsvd_deploy.format.manifest import REPORT_SUMS_FILE, announce_reports, record_reports, weights_digest
from ercsvd_deploy.pipelines.reporting.card import make_card
from ercsvd_deploy.pipelines.reporting.document import Report, parse_report
from ercsvd_deploy.pipelines.reporting.html.page import PAGE_NEEDS, can_make_page, make_page
from ercsvd_deploy.pipelines.stages.export import CARD_FILE, PAGE_FILE, REPORT_FILE, REPORT_FILES

__all__ = ["REPORT_FILES", "write_report_files"]


def write_report_files(directory: Path, report: Report, target: Path | None = None) -> list[str]:
    """Write report, page and model card into a directory, in place of those that are there.

    Args:
        directory: Where to.
        report: What to tell.
        target: Where the directory will be, if that is somewhere else.

    Returns:
        What could not be made, and how to get it; a run that took hours is not called failed for a picture.

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


def _write(directory: Path, report: Report, shown: Path) -> list[str]:
    values = report.as_json()
    write_json_atomically(directory / REPORT_FILE, values)
    read = parse_report(values)  # what `ercsvd report` will read, which makes the same page
    (directory / PAGE_FILE).unlink(missing_ok=True)  # an older one would tell of another model
    write_text_atomically(directory / CARD_FILE, make_card(read, directory, shown))
    again = f"ercsvd report {shown}"
    if not can_make_page():
        return [f"no {PAGE_FILE} was written, for want of matplotlib and jinja2: {PAGE_NEEDS}, then {again}"]
    try:
        page = make_page(read, shown)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, ImportError) as error:
        return [f"no {PAGE_FILE} was written ({type(error).__name__}: {error}); `{again} --debug` shows why"]
    write_text_atomically(directory / PAGE_FILE, page)
    return []
