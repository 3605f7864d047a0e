"""The files in which a run tells of itself: the report for machines, the page, and the model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ercsvd_deploy.format.atomic_files import write_json_atomically, write_text_atomically
from ercsvd_deploy.format.manifest import REPORT_SUMS_FILE, record_reports
from ercsvd_deploy.pipelines.judging.check import REPORT_FILE
from ercsvd_deploy.pipelines.reporting.card import CARD_FILE, ORIGINAL_CARD_FILE, make_card
from ercsvd_deploy.pipelines.reporting.html.page import PAGE_FILE, PAGE_NEEDS, can_make_page, make_page
from ercsvd_deploy.pipelines.reporting.schema import ReportError, parse_report

# Written again when the finished export has been measured, so the manifest has no checksums of them.
REPORT_FILES = frozenset({REPORT_FILE, PAGE_FILE, CARD_FILE, REPORT_SUMS_FILE})


def write_report_files(directory: Path, report: dict[str, Any], target: Path | None = None) -> list[str]:
    """Write report, page and model card into a directory, in place of those that are there.

    Args:
        directory: Where to.
        report: The report as plain JSON values.
        target: Where the directory will be, if that is somewhere else.

    Returns:
        What could not be made, and how to get it; a run that took hours is not called failed for a picture.

    Raises:
        OSError: a file cannot be written.
    """
    problems = _write(directory, report, target or directory)
    record_reports(directory, REPORT_FILES - {REPORT_SUMS_FILE})
    return problems


def _write(directory: Path, report: dict[str, Any], shown: Path) -> list[str]:
    write_json_atomically(directory / REPORT_FILE, report)
    try:
        document = parse_report(report)
    except ReportError as error:
        return [f"no page and no model card were written: {error}"]
    (directory / PAGE_FILE).unlink(missing_ok=True)  # an older one would tell of another model
    write_text_atomically(directory / CARD_FILE, make_card(document, directory, shown))
    again = f"ercsvd report {shown}"
    if not can_make_page():
        return [f"no {PAGE_FILE} was written, for want of matplotlib and jinja2: {PAGE_NEEDS}, then {again}"]
    try:
        page = make_page(document, shown)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, ImportError) as error:
        return [f"no {PAGE_FILE} was written ({type(error).__name__}: {error}); `{again} --debug` shows why"]
    write_text_atomically(directory / PAGE_FILE, page)
    return []


def carry_over_card(source: Path, directory: Path) -> None:
    """Copy the original model's own card, which names its licence, beside ours."""
    card = source / CARD_FILE
    if card.is_file():
        shutil.copyfile(card, directory / ORIGINAL_CARD_FILE)
