"""What is suggested where a gate of quality was missed."""

from __future__ import annotations

from typing import Any

import pytest

from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.judging.remedies import suggest_remedy

LEARNED = "recover: {rounding: true} behind quantize"


def quantize(bits: int) -> dict[str, Any]:
    return {"quantize": {"bits": bits}, "factorize": None, "recover": None}


def perplexity(increase: float | None, limit: float = 0.1) -> GateResult:
    return GateResult(
        "perplexity_increase", "prose", limit, increase, increase is not None and increase <= limit
    )


def divergence(nats: float, limit: float = 0.1) -> GateResult:
    return GateResult("logprob_kl", "prose", limit, nats, nats <= limit)


@pytest.mark.parametrize(
    ("results", "recipe", "expected"),
    [
        ([divergence(0.3)], {"stages": [quantize(4)]}, "quantize.bits: 5"),  # 3 times: 0.8 bits
        ([divergence(0.5)], {"stages": [quantize(4)]}, "quantize.bits: 6"),  # 5 times: 1.2 bits
        ([divergence(2.0)], {"stages": [quantize(4)]}, "quantize.bits: 8"),  # 20 times: 2.2 bits
        ([divergence(0.3), perplexity(0.09)], {"stages": [quantize(2)]}, "quantize.bits: 3"),
        ([perplexity(0.5)], {"stages": [quantize(3)]}, "quantize.bits: 5"),  # ln 1.5 / ln 1.1 = 4.3
        ([divergence(0.13)], {"stages": [quantize(4)]}, f"quantize.bits: 5, or {LEARNED}"),
        ([divergence(0.13)], {"stages": [quantize(8)]}, LEARNED),
        ([divergence(0.4)], {"stages": [quantize(8)]}, None),
        (
            [divergence(0.13)],
            {"stages": [quantize(4), {"recover": {"rounding": True}}]},
            "quantize.bits: 5",
        ),
        (
            [divergence(0.4)],
            {"stages": [quantize(4)], "target": {"overall_bits": 3.25, "bits": [2, 8]}},
            "overall_bits: 4.3",
        ),
        (
            [divergence(0.4)],
            {"stages": [quantize(4)], "target": {"model_bits": 4.0, "bits": [5]}},
            "model_bits: 5",
        ),
        ([divergence(9.0)], {"stages": [quantize(4)], "target": {"overall_bits": 3.0, "bits": [4]}}, None),
        (
            [divergence(0.4), GateResult("max_size_ratio", None, 0.3, 0.4, False)],
            {"stages": [quantize(4)]},
            None,
        ),
        ([divergence(0.4)], {"stages": [{"quantize": {"bits": 4, "overrides": {"*": {"bits": 3}}}}]}, None),
        ([divergence(0.4)], {"stages": [quantize(4)], "target": {"bytes": "3GB"}}, None),
        (
            [divergence(0.3)],
            {"stages": [{"factorize": {"compression_ratio": 0.2}}, quantize(4)]},
            "lower factorize.compression_ratio",
        ),
        ([divergence(0.05)], {"stages": [quantize(4)]}, None),
        ([divergence(0.3, limit=0.0)], {"stages": [quantize(4)]}, None),
        ([perplexity(None)], {"stages": [quantize(4)]}, None),
        ([GateResult("max_size_ratio", None, 0.3, 0.4, False)], {"stages": [quantize(4)]}, None),
        ([divergence(0.3)], {"stages": [{"recover": {}}]}, None),
    ],
)
def test_remedies(results: list[GateResult], recipe: dict[str, Any], expected: str | None) -> None:
    suggestion = suggest_remedy(results, recipe)
    if expected is None:
        assert suggestion is None
    else:
        assert suggestion is not None
        assert expected in suggestion
