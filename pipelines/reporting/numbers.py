"""Numbers as people read them: sizes, counts, shares and changes."""

from __future__ import annotations

import math
from typing import TypeGuard

_UNITS = ("B", "KB", "MB", "GB", "TB")
NOT_MEASURED = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"  # as wide as the plus


def encodable(text: str) -> str:
    """Return text that UTF-8 can encode: file names may contain bytes that are not valid UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def readable_bytes(size: float) -> str:
    """Return bytes in decimal units: 4.94 MB."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:#.3g}".removesuffix(".") + f" {_UNITS[unit]}" if unit else f"{size:.0f} B"


def readable_count(count: int) -> str:
    """Return a count as people read it: 1,234,567 or, for large ones, 7.24 billion."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e8 else f"{count:,}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured number, or a dash."""
    if not _is_measured(value):
        return NOT_MEASURED
    text = f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", MINUS)


def with_unit(figure: str, unit: str) -> str:
    """Return a formatted number with its unit; a dash gets no unit."""
    return figure if figure == NOT_MEASURED else f"{figure} {unit}"


def percent(share: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return NOT_MEASURED if not _is_measured(share) else f"{100 * share:.1f} %"


def relative(before: float | None, after: float | None) -> str:
    """Return the relative change."""
    if not before or not _is_measured(before) or not _is_measured(after):
        return ""
    return signed(100 * (after / before - 1), ".1f") + " %"


def points(before: float | None, after: float | None) -> str:
    """Return the change of a share in percentage points."""
    if not _is_measured(before) or not _is_measured(after):
        return ""
    return signed(100 * (after - before), ".1f") + " points"


def difference(before: float | None, after: float | None) -> str:
    """Return the change of a plain number."""
    return signed(after - before, ".4f") if _is_measured(before) and _is_measured(after) else ""


def signed(value: float, form: str) -> str:
    """Return a number with its sign, the minus as wide as the plus."""
    return f"{value:+{form}}".replace("-", MINUS)


def _is_measured(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
