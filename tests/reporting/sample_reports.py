"""A report with every part in it, small enough to reason about."""

from __future__ import annotations

import copy
import json
from typing import Any

from ercsvd_deploy.pipelines.reporting.report.document import Report, parse_report

MINUS = "\N{MINUS SIGN}"
HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(1)>$x$ \"'&#0a0b01;"


def sample_report(**changed: Any) -> dict[str, Any]:
    """Return a report as its JSON has it, with some top-level keys replaced."""
    return copy.deepcopy(_SAMPLE) | changed


def sample_document(**changed: Any) -> Report:
    """Return the same, read."""
    return parse_report(sample_report(**changed))


def figures(num_bytes: int, perplexity: float, exact_match: float) -> dict[str, Any]:
    return {
        "num_bytes": num_bytes,
        "bytes_by_part": {"outside the layers": num_bytes // 4, "factors": num_bytes - num_bytes // 4},
        "linear_bits_per_weight": num_bytes / 125_000,
        "parameters": 1_000_000,
        "linear_parameters": num_bytes // 2,
        "model_bits_per_weight": num_bytes / 125_000 + 1,
        "perplexity": {"prose": perplexity, "code": 2 * perplexity},
        "exact_match": {"shapes": exact_match},
        "tasks": {"arc": {"acc": exact_match / 2}},
        "estimates": {
            "perplexity": {
                "prose": estimate(perplexity, 0.5, 64, "windows"),
                "code": estimate(2 * perplexity, 0.25, 64, "windows"),
            },
            "exact_match": {"shapes": estimate(exact_match, 0.03125, 80, "questions")},
            "tasks": {"arc": {"acc": estimate(exact_match / 2, 0.02, 500, "documents")}},
        },
    }


def estimate(value: float, margin: float | None, count: int, unit: str) -> dict[str, Any]:
    ends = {"low": None, "high": None} if margin is None else {"low": value - margin, "high": value + margin}
    return {"value": value, **ends, "count": count, "unit": unit}


def _gate(gate: str, subject: str | None, limit: float, value: float | None, **more: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("reason", "low", "high", "count", "unit", "deciding_count"))
    passed = value is not None and value <= limit
    is_undecided = more.get("low") is not None and more["low"] <= limit < more["high"]
    return {
        "gate": gate,
        "subject": subject,
        "limit": limit,
        "value": value,
        "passed": passed,
        "verdict": "undecided" if is_undecided else "passed" if passed else "missed",
        **nothing,
    } | more


def _linear(layer: int, kind: str, rank: int | None) -> dict[str, Any]:
    return {
        "name": f"model.layers.{layer}.mlp.{kind}",
        "shape": [64, 32],
        "rank": rank,
        "weight_error": 0.25,
        "calibration_error": 0.125,
        "residual_rank": None,
        "spectrum": [[1, 1.0], [4, 0.5], [32, 0.01 * (layer + 1)]],
    }


def _matrix(layer: int, factor: str) -> dict[str, Any]:
    return {
        "name": f"model.layers.{layer}.mlp.up_proj.{factor}",
        "shape": [16, 32],
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "method": "gptq",
        "gptq_loss": 0.001,
        "rtn_loss": 0.004,
        "damping": 0.01,
        "routed_tokens": None,
        "is_pooled": False,
    }


def _difference(mean: float) -> dict[str, Any]:
    return {"mean": mean, "largest": 10 * mean, "num_tokens": 256}


def _served(size: int, mean: float) -> dict[str, Any]:
    agreement = {
        "subject": "texts",
        "num_prompts": 4,
        "prompt": _difference(mean / 2),
        "decoded": _difference(mean),
        "together": _difference(0.75 * mean),
        "greedy_agreeing": 250,
    }
    return {
        "tensor_parallel_size": size,
        "mode": "compiled, with CUDA graphs",
        "seconds": 30.5,
        "agreements": [agreement, {**agreement, "subject": "pictures"}],
    }


_LOSSES = {"gptq_loss": 0.001, "rtn_loss": 0.004, "damping": 0.01}
_SAMPLE: dict[str, Any] = {
    "report_version": 2,
    "recipe": {
        "model": {"path": "organisation/small-7b", "trust_remote_code": False},
        "stages": [
            {"factorize": {"method": "erc_svd", "allocation": "last_k"}},
            {"quantize": {"method": "gptq", "bits": 4}},
        ],
        "serving": {"tensor_parallel_sizes": [1, 2]},
        "export": {"path": "out/small"},
    },
    "environment": {"ercsvd-deploy": "0.1.0", "device": "cpu (x86_64)"},
    "provenance": {"seed": 3, "recipe_sha256": "ab" * 32, "model_files_sha256": {"config.json": "cd" * 32}},
    "weights_sha256": "ef" * 32,
    "task": "generate",
    "original": figures(2_000_000, 10.0, 0.9),
    "compressed": figures(1_000_000, 11.0, 0.875),
    "components": [
        {
            "name": "language model",
            "original_parameters": 900_000,
            "parameters": 500_000,
            "num_bytes": 900_000,
            "treatment": "4 Linears low-rank int4",
        }
    ],
    "change": {
        "layer_errors": {"prose": [0.1, 0.2, 0.3], "code": [0.2, 0.3, 0.5]},
        "final_layer_error": {"prose": 0.3, "code": 0.5},
        "logprob_kl": {"prose": 0.05, "code": None},
    },
    "factorize": {
        "num_compressed_layers": 2,
        "layer_ratio": 0.5,
        "parameter_budget": 1_000_000,
        "kept_parameters": 990_000,
        "achieved_compression_ratio": 0.5,
        "budget": {"unit": "parameters", "allowed": 1_000_000, "spent": 990_000},
        "search": [
            {
                "num_compressed_layers": k,
                "layer_ratio": 1 / k,
                "kept_parameters": 9,
                "final_layer_error": error,
            }
            for k, error in ((1, 0.6), (2, 0.3), (3, None))
        ],
        "linears": [
            _linear(layer, kind, rank)
            for layer in (1, 2)
            for kind, rank in (("up_proj", 16), ("down_proj", None))
        ],
        "allocation": [],
        "predicted_kl": None,
    },
    "quantize": {
        "matrices": [_matrix(layer, factor) for layer in (1, 2) for factor in ("factor_a", "factor_b")],
        "linears": [
            {
                "name": "model.layers.1.mlp.up_proj",
                "loss": 0.002,
                "factors": {
                    "factor_a": _LOSSES,
                    "factor_b": _LOSSES,
                    "loss_unquantized": 0.0,
                    "loss_first_quantized": 0.001,
                    "loss_refitted": 0.0005,
                    "loss": 0.002,
                },
                "leading_share": 0.4,
                "correction": None,
            },
            {
                "name": "model.layers.2.mlp.up_proj",
                "loss": 0.004,
                "factors": None,
                "leading_share": None,
                "correction": {
                    "rank": 8,
                    "integers": _LOSSES,
                    "factor_a": _LOSSES,
                    "factor_b": None,
                    "loss_uncorrected": 0.009,
                    "loss_by_round": [0.005, 0.004],
                },
            },
        ],
        "patterns": [
            {"pattern": "*.down_proj", "purpose": "ignore", "modules": ["model.layers.1.mlp.down_proj"]}
        ],
        "embedding": {
            "name": "model.embed_tokens",
            "shape": [64, 32],
            "bits": 8,
            "group_size": 32,
            "error": 0.000125,
        },
        "output_layer": None,
    },
    "serving": {
        "mean_difference": 0.01,
        "largest_difference": 0.2,
        "num_tokens": 512,
        "tensor_parallel_size": 1,
        "vllm_version": "0.32.0",
        "sizes": [_served(1, 0.01), _served(2, 0.02)],
        "failures": [
            {
                "tensor_parallel_size": 4,
                "process": "Worker_TP3",
                "exception": "RuntimeError: no room",
                "excerpt": "Traceback (most recent call last):\n  File <frozen>\nRuntimeError: no room",
                "log": "out/small.vllm.log",
            }
        ],
        "not_measured": {"8": "it takes 8 GPUs, and this machine has 4"},
    },
    "gates": [
        _gate("perplexity_increase", "prose", 0.2, 0.1, low=0.08, high=0.12, count=64, unit="windows"),
        _gate("max_size", None, 500_000.0, 1_000_000.0),
        _gate("logprob_kl", "code", 0.1, None, reason="the model is away"),
        _gate("exact_match_drop", "shapes", 0.02, 0.025, low=-0.005, high=0.055, count=80, unit="questions")
        | {"deciding_count": 2880},
    ],
    "differences": {
        "perplexity_increase": {"prose": estimate(0.1, 0.02, 64, "windows")},
        "logprob_kl": {"prose": estimate(0.05, 0.01, 64, "windows")},
        "exact_match_drop": {"shapes": estimate(0.025, 0.03, 80, "questions")},
        "task_drop": {"arc": {"acc": estimate(0.0125, 0.025, 500, "documents")}},
    },
    "tables": [
        {
            "title": "Search over the number of compressed layers",
            "columns": ["last k layers", "final-layer error", ""],
            "rows": [["1", "0.6000", ""], ["2", "0.3000", "chosen"]],
            "numbers": ["last k layers", "final-layer error"],
            "bold_rows": [1],
            "is_detail": False,
        },
        {
            "title": "Factorized Linears",
            "columns": ["Linear", "rank"],
            "rows": [["model.layers.1.mlp.up_proj", "16"], ["model.layers.2.mlp.up_proj", "16"]],
            "numbers": ["rank"],
            "bold_rows": [],
            "is_detail": True,
        },
    ],
    "references": [],
    "seconds": {"factorize": 12.5},
    "warnings": ["the texts are short"],
    "resumed": ["factorize: 2 of 3 layers"],
}


def everywhere_hostile() -> dict[str, Any]:
    """Return a report in which every name and text that comes from outside is an attack."""
    text = json.dumps(sample_report())
    report: dict[str, Any] = json.loads(text.replace("prose", json.dumps(HOSTILE)[1:-1]))
    report["recipe"]["model"]["path"] = f"organisation/{HOSTILE}"
    report["recipe"]["export"]["path"] = f"out/{HOSTILE}"
    report["warnings"] = [HOSTILE]
    report["resumed"] = [HOSTILE]
    report["environment"] = {HOSTILE: HOSTILE}
    report["provenance"] = {HOSTILE: {HOSTILE: HOSTILE}}
    report["seconds"] = {HOSTILE: 1.0}
    report["components"] = [{**report["components"][0], "name": HOSTILE, "treatment": HOSTILE}] * 2
    for part in ("original", "compressed"):
        report[part]["bytes_by_part"] = {HOSTILE: 1000}
    for linear in report["factorize"]["linears"]:
        linear["name"] = f"model.layers.0.{HOSTILE}"
    for matrix in report["quantize"]["matrices"]:
        matrix["name"] = f"model.layers.0.{HOSTILE}"
    report["references"] = [
        {"label": HOSTILE, "num_bytes": 1500, "perplexity": {HOSTILE: 10.5}, "exact_match": {HOSTILE: 0.5}}
    ]
    report["gates"][0]["gate"] = HOSTILE
    [failure] = report["serving"]["failures"]
    failure |= dict.fromkeys(("process", "exception", "excerpt", "log"), HOSTILE)
    report["serving"]["sizes"][0]["mode"] = HOSTILE
    return report
