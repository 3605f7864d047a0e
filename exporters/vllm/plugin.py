"""The entry point that registers the quantization method `ercsvd` with stock vLLM.

vLLM calls `register` in every process it starts (front end, engine core, workers, the one that inspects the
model class), several times in some: it only adds a class to a table, and imports vLLM inside the call
because this module is also imported by tools that list entry points.

A user who sets `VLLM_PLUGINS` must name `ercsvd` in it.
"""

from __future__ import annotations

import multiprocessing

from ercsvd_deploy.format.schema import QUANT_METHOD


def register() -> None:
    """Register `quant_method: ercsvd` with vLLM, unless it is registered already.

    If this release of vLLM was not tested, log one warning and continue.
    """
    from ercsvd_deploy.exporters.vllm import compatibility

    if QUANT_METHOD in compatibility.QUANTIZATION_METHODS:
        return
    untested = compatibility.untested_release()
    if untested and multiprocessing.parent_process() is None:  # vLLM's children need not repeat it
        compatibility.init_logger("vllm.ercsvd").warning("%s; it may work all the same", untested)
    from ercsvd_deploy.exporters.vllm.config import ErcSvdConfig

    compatibility.register_quantization_config(QUANT_METHOD)(ErcSvdConfig)
