"""What a report says of serving parity, as rows and paragraphs: for the terminal and for the page.

Both read plain JSON values, so that a run that has just ended and a report from the disk look the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SERVING_TITLE = "vLLM beside this package: mean and largest difference of log-probs, in nats"
SERVING_HEADS = (
    "tensor-parallel size",
    "on",
    "prompts",
    "decoding",
    "together",
    "tokens",
    "greedy tokens alike",
)


def serving_rows(serving: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Return a row for each size and kind of prompt that was measured, under `SERVING_HEADS`."""
    return [
        (
            f"{size['tensor_parallel_size']}, {size['mode']}",
            found["subject"],
            _difference(found["prompt"]),
            _difference(found["decoded"]),
            _difference(found["together"]),
            f"{found['together']['num_tokens']:,}",
            f"{found['greedy_agreeing']} of {found['decoded']['num_tokens']}",
        )
        for size in (serving or {}).get("sizes", ())
        for found in size["agreements"]
    ]


def failure_title(failure: Mapping[str, Any]) -> str:
    """Return on one line at which size vLLM failed, and which of its processes first."""
    first = f"; {failure['process']} failed first" if failure["process"] else ""
    return f"vLLM failed at tensor-parallel size {failure['tensor_parallel_size']}{first}"


def failure_text(failure: Mapping[str, Any], *, with_excerpt: bool) -> str:
    """Return why vLLM failed, as preformatted text: the exception, where its log is, what was printed."""
    parts = [failure["exception"]]
    if failure["log"]:
        parts.append(f"The whole log: {failure['log']}")
    if with_excerpt and failure["excerpt"]:
        parts.append(failure["excerpt"])
    return "\n\n".join(parts) if with_excerpt else "\n".join(parts)


def _difference(found: Mapping[str, Any]) -> str:
    return f"{_number(found['mean'])}, {_number(found['largest'])}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
