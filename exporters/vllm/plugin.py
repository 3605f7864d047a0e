"""The entry point through which stock vLLM learns the quantization method `ercsvd`.

vLLM calls `register` in every process it starts (front end, engine core, workers, the one that inspects the
model class), several times in some: it only adds a class to a table, and imports vLLM inside the call
because this module is also imported by tools that list entry points.

A user who sets `VLLM_PLUGINS` must name `ercsvd` in it.
"""

from __future__ import annotations

from ercsvd_deploy.checkpoint_schema import QUANT_METHOD


def register() -> None:
    """Make `quant_method: ercsvd` known to vLLM; further calls change nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    from ercsvd_deploy.exporters.vllm.quantization_config import ErcSvdConfig

    register_quantization_config(QUANT_METHOD)(ErcSvdConfig)
