"""Who is compared: a name, an environment, a script of this folder and its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUP_SIZE = 64  # divides this model's widths; all integers have it, GGUF's aside
ITERATIONS, BATCH = 50, 4  # AutoRound's defaults, 200 of 8, would take hours on two cores
ERROR_CONTROL: dict[str, Any] = {  # keys of a factorize stage
    "method": "svd_llm",
    "output_metric": "fisher",
    "allocation": "error_controlled",
    "num_fisher_samples": 16,
    "compressed_prefix_inputs": True,
    "rank_multiple": 32,
}


@dataclass(frozen=True)
class Contender:
    """One way to compress the model."""

    name: str
    environment: str
    script: str
    options: dict[str, Any]


def contenders(calibration: dict[str, Any], gguf: Path) -> list[Contender]:
    """Return all of them.

    Args:
        calibration: The recipe's section, for ours.
        gguf: The file inside the wheel that the model was made of, for llama.cpp.
    """
    return [
        *(
            Contender(
                f"llm-compressor GPTQ W{bits}A16",
                "llm-compressor",
                "llm_compressor_run.py",
                {"bits": bits, "group_size": GROUP_SIZE},
            )
            for bits in (8, 4)
        ),
        *(
            Contender(
                f"gptqmodel GPTQ {bits} bits",
                "gptqmodel",
                "gptqmodel_run.py",
                {"bits": bits, "group_size": GROUP_SIZE},
            )
            for bits in (4, 3, 2)
        ),
        *(
            Contender(f"GGUF {kind}", "llama-cpp", "llama_cpp_run.py", {"file_type": kind, "gguf": str(gguf)})
            for kind in ("Q4_K_M", "Q3_K_M", "Q2_K")
        ),
        *_ours(calibration),
        *_auto_round(),
    ]


def _auto_round() -> list[Contender]:
    shared = {"group_size": GROUP_SIZE, "iterations": ITERATIONS, "batch_size": BATCH}
    schemes: dict[str, dict[str, Any]] = {f"{bits} bits": {"bits": bits} for bits in (4, 3, 2)}
    for average in (3.5, 3.0):
        schemes[f"mixed, {average} bits"] = {"mixed_bits": [2, 3, 4, 8], "average_bits": average}
    return [
        Contender(f"AutoRound {name}", "auto-round", "auto_round_run.py", shared | scheme)
        for name, scheme in schemes.items()
    ]


def _ours(calibration: dict[str, Any]) -> list[Contender]:
    integers = {"quantize": {"bits": 4, "group_size": GROUP_SIZE}}
    methods: dict[str, dict[str, Any]] = {
        "ours, GPTQ-8": {"stages": [{"quantize": {"bits": 8, "group_size": GROUP_SIZE}}]},
        "ours, GPTQ-4": {"stages": [integers]},
        "ours, GPTQ-4, groups of 32": {"stages": [{"quantize": {"bits": 4, "group_size": 32}}]},
        "ours, GPTQ-4, recovered": {
            "stages": [integers, {"recover": {"steps": ITERATIONS, "batch_size": BATCH}}],
            "note": f"scales trained, {ITERATIONS} steps of {BATCH} sequences",
        },
        "ours, GPTQ-4, tokens by energy": {"stages": [integers], "token_weight": "uniform"},
        "ours, GPTQ-4, tokens by sensitivity": {"stages": [integers], "token_weight": "sensitivity"},
        "ours, GPTQ-3": {"stages": [{"quantize": {"bits": 3, "group_size": GROUP_SIZE}}]},
        "ours, GPTQ-3, tokens by sensitivity": {
            "stages": [{"quantize": {"bits": 3, "group_size": GROUP_SIZE}}],
            "token_weight": "sensitivity",
        },
    }
    learned = {"recover": {"steps": ITERATIONS, "batch_size": BATCH, "rounding": True}}
    trained = f"scales and rounding trained, {ITERATIONS} steps of {BATCH} sequences"
    for bits in (4, 3):
        methods[f"ours, GPTQ-{bits}, rounding learned"] = {
            "stages": [{"quantize": {"bits": bits, "group_size": GROUP_SIZE}}, learned],
            "note": trained,
        }
    for overall in (3.5, 3.0):
        target = {"overall_bits": overall, "bits": [2, 3, 4, 5, 6, 8], "group_sizes": [32, 64, 128]}
        name = f"ours, mixed bits, {overall} bits"
        methods[name] = {"stages": [integers], "target": target}
        methods[f"{name}, rounding learned"] = {
            "stages": [integers, learned],
            "target": target,
            "note": trained,
        }
    for bits in (4.0, 3.5, 3.0):
        name = f"ours, error control, {bits} bits"
        methods[name] = {
            "stages": [{"factorize": ERROR_CONTROL}, integers],
            "target": {"overall_bits": bits},
        }
        methods[f"{name}, tokens by energy"] = methods[name] | {"token_weight": "uniform"}
    for method, name in (("svd_llm", "SVD-LLM"), ("erc_svd", "ERC-SVD")):
        for ratio in (0.2, 0.4):
            factorize = {"method": method, "compression_ratio": ratio, "rank_multiple": 32}
            label = f"{name}, {100 * ratio:.0f} % removed"
            published = {"note": "as published, by this package", "token_weight": "uniform"}
            methods[label] = published | {"stages": [{"factorize": factorize}]}
            methods[f"{label}, GPTQ-4"] = published | {
                "stages": [{"factorize": factorize}, {"quantize": {"bits": 4, "group_size": 32}}]
            }
    return [
        Contender(name, "ours", "ours_run.py", {"calibration": calibration, **options})
        for name, options in methods.items()
    ]
