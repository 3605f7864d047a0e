"""The smallest report that `ercsvd check` reads, to be damaged."""

from __future__ import annotations

from typing import Any

from ercsvd_deploy.pipelines.reporting.report.document import REPORT_VERSION

FIGURES = {
    "num_bytes": 1000,
    "bytes_by_part": {"factors": 1000},
    "linear_bits_per_weight": 4.25,
    "parameters": 500,
    "linear_parameters": 400,
    "perplexity": {"prose": 12.5, "code": 9.0},
    "exact_match": {"pictures": 0.9},
    "tasks": {"arc_easy": {"acc,none": 0.5}},
}
REPORT: dict[str, Any] = {
    "report_version": REPORT_VERSION,
    "original": FIGURES,
    "compressed": FIGURES,
    "change": {"final_layer_error": {"prose": 0.1}, "logprob_kl": {"prose": 0.01}},
    "recipe": {
        "gates": {
            "perplexity_increase": {"prose": 0.1},
            "logprob_kl": 0.2,
            "final_layer_error": 0.3,
            "exact_match_drop": 0.02,
            "task_drop": 0.02,
            "max_size": "1GB",
            "max_size_ratio": 0.5,
        }
    },
}
