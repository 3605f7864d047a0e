"""Plain values made valid JSON. It imports no torch, because the command line prints with it."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """Return plain values that JSON can represent: no infinities, and no lone surrogates.

    A number that is not finite becomes null. File names may contain bytes that are not valid UTF-8.
    """
    if isinstance(value, dict):
        return {finite(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
