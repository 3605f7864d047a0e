"""The description of a checkpoint of dense integers in compressed-tensors' format, which stock loaders read.

Its tensors are those of our own format without the guards: without low-rank matrices, `pack-quantized` can
name all of them. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ercsvd_deploy.format.schema import GUARD, Storage, WeightQuantization

QUANT_METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_OUTPUT_LAYER = "lm_head"
# At other bits the library leaves the rest of a word empty, and vLLM's loader reads words without gaps.
READABLE_BITS = (2, 4, 8)


def why_unreadable(storage: Storage, *, is_embedding: bool, is_output_layer: bool) -> str | None:
    """Return why compressed-tensors or vLLM's loader cannot read a matrix; None if they can."""
    del is_output_layer  # is read like others
    if is_embedding:
        return (
            "is the input embedding: vLLM looks up integers of this format in few models, on GPUs alone, and "
            "never where an output layer is tied to it"
        )
    if storage.layout != "dense":
        return f"is {storage.label}: the format has no low-rank matrices"
    if storage.weight is not None and storage.weight.bits not in READABLE_BITS:
        return (
            f"has {storage.weight.bits} bits: compressed-tensors and vLLM agree on words of 2, 4 and 8 bits "
            "only"
        )
    return None


def guards_of(modules: Iterable[str]) -> set[str]:
    """Return the names of our empty guard tensors, which other loaders would take for weights."""
    return {f"{module}.{GUARD}" for module in modules}


def describe(modules: Mapping[str, Storage], plain: Collection[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    Args:
        modules: Checkpoint name of every changed Linear -> its storage; all of them readable.
        plain: Checkpoint names of the layers' other modules with matrices.
    """
    del plain  # what no group names is left alone
    targets: dict[WeightQuantization, list[str]] = {}
    for name, storage in modules.items():
        assert storage.weight is not None
        targets.setdefault(storage.weight, []).append(name)
    return {
        "quant_method": QUANT_METHOD,
        "format": _PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": weight_arguments(integers),
                "input_activations": None,
                "output_activations": None,
                "format": _PACKED,
            }
            for number, (integers, names) in enumerate(targets.items())
        },
        "ignore": [] if _OUTPUT_LAYER in modules else [_OUTPUT_LAYER],
        "kv_cache_scheme": None,
    }


def weight_arguments(integers: WeightQuantization) -> dict[str, Any]:
    """Return the `QuantizationArgs` of one matrix's integers, as a mapping."""
    is_per_row = integers.group_size == -1
    return {
        "num_bits": integers.bits,
        "type": "int",
        "symmetric": integers.sym,
        "strategy": "channel" if is_per_row else "group",
        "group_size": None if is_per_row else integers.group_size,
        "dynamic": False,
    }
