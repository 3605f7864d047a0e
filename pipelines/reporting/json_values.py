"""Plain values as JSON can have them. No torch here: the command line prints with this."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """Return plain values as JSON can have them: no infinity, and no halves of characters.

    A number that is not finite becomes null. Names of files may have bytes in them that are no characters.
    """
    if isinstance(value, dict):
        return {finite(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
