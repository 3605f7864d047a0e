"""Numbers as people read them: sizes, counts, shares and changes."""

from __future__ import annotations

import math
from typing import TypeGuard

_UNITS = ("B", "KB", "MB", "GB", "TB")
NOT_MEASURED = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"  # as wide as the plus


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: names of files may have bytes in them that are no characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def readable_bytes(size: float) -> str:
    """Return bytes in decimal units: 4.94 MB."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:#.3g}".removesuffix(".") + f" {_UNITS[unit]}" if unit else f"{size:.0f} B"


def readable_count(count: int) -> str:
    """Return a count: 1,234,567 or, where nobody counts digits any more, 7.24 billion."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e8 else f"{count:,}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured number, or a dash."""
    if not _is_known(value):
        return NOT_MEASURED
    told = f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
    return told.replace("-", MINUS)


def with_unit(told: str, unit: str) -> str:
    """Return a number with its unit; a dash has none."""
    return told if told == NOT_MEASURED else f"{told} {unit}"


def percent(share: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return NOT_MEASURED if not _is_known(share) else f"{100 * share:.1f} %"


def relative(before: float | None, after: float | None) -> str:
    """Return the relative change."""
    if not before or not _is_known(before) or not _is_known(after):
        return ""
    return signed(100 * (after / before - 1), ".1f") + " %"


def points(before: float | None, after: float | None) -> str:
    """Return the change of a share in percentage points."""
    if not _is_known(before) or not _is_known(after):
        return ""
    return signed(100 * (after - before), ".1f") + " points"


def difference(before: float | None, after: float | None) -> str:
    """Return the change of a plain number."""
    return signed(after - before, ".4f") if _is_known(before) and _is_known(after) else ""


def signed(value: float, form: str) -> str:
    """Return a number with its sign, the minus as wide as the plus."""
    return f"{value:+{form}}".replace("-", MINUS)


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
