"""What would pass a missed gate of quality: an estimate from how rounding errors grow as bits get fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from ercsvd_deploy.format.schema import Bits

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.gates import GateResult

# A bit more halves the steps of a grid, and errors count squared. Measured from 4 bits to 3: 2.6 to 4.4
# (benchmarks/results/sizes-*.md).
_LOSS_PER_BIT = 4
_SIZE_GATES = ("max_size", "max_size_ratio")
_LEARNED_ROUNDING_LEAVES = 0.6  # of what GPTQ loses, about (benchmarks/results/peers-smollm2.md)


def suggest_remedy(results: Sequence[GateResult], recipe: Mapping[str, Any]) -> str | None:
    """Return what is likely to pass the missed gates of texts; None if none was missed or nothing is known.

    Args:
        results: The verdicts.
        recipe: The recipe that made the model, as plain values.
    """
    excess = max((_excess(result) for result in results if not result.passed), default=0.0)
    stages = {
        kind: settings for stage in recipe.get("stages", []) for kind, settings in stage.items() if settings
    }
    if excess <= 1 or not math.isfinite(excess) or "quantize" not in stages:
        return None
    target = recipe.get("target")
    if "factorize" in stages and target is None:
        return (
            "low rank costs well-trained models more than integers of as many bytes: lower "
            "factorize.compression_ratio, or compare with quantize alone"
        )
    found = []
    if not any(result.gate in _SIZE_GATES and not result.passed for result in results):
        found = _more_bits(math.log(excess, _LOSS_PER_BIT), stages["quantize"], target)
    learns = any(stage.get("recover") and stage["recover"].get("rounding") for stage in recipe["stages"])
    if not learns and excess * _LEARNED_ROUNDING_LEAVES <= 1:
        found.append("recover: {rounding: true} behind quantize")
    return f"likely to pass, by rule of thumb: {', or '.join(found)}" if found else None


def _more_bits(missing: float, quantize: Mapping[str, Any], target: Mapping[str, Any] | None) -> list[str]:
    """Return the key with so many more bits; nothing if no more are on offer, or a target is in bytes."""
    if any((change or {}).get("bits") for change in quantize.get("overrides", {}).values()):
        return []
    if target is None:
        enough = [bits for bits in get_args(Bits) if bits >= quantize["bits"] + missing]
        return [f"quantize.bits: {enough[0]}"] if enough else []
    most = max(target.get("bits") or [quantize["bits"]])
    for key in ("overall_bits", "model_bits"):
        if target.get(key) is not None:
            enough = math.ceil(10 * (target[key] + missing)) / 10
            return [f"target.{key}: {enough:g}"] if enough <= most else []
    return []


def _excess(result: GateResult) -> float:
    """Return how many times the loss in nats is as large as allowed; 0 if the gate is not about a loss."""
    if result.value is None or result.limit <= 0:
        return 0.0
    if result.gate == "perplexity_increase":
        return math.log1p(result.value) / math.log1p(result.limit)
    return result.value / result.limit if result.gate == "logprob_kl" else 0.0
