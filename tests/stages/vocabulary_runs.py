"""Names and stages of recipes that store the input embedding and the output layer as integers."""

from __future__ import annotations

from typing import Any

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens", "lm_head"


def quantize(**settings: Any) -> dict[str, Any]:
    """Return a quantize stage of 8 bits, whose groups fit the tiny models."""
    return {"quantize": {"bits": 8, "group_size": 32} | settings}
