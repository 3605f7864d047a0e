"""gptqmodel's GPTQ (auto-gptq's successor) of one matrix, as the reference of tests and benchmarks."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ercsvd_deploy.quantization.grid import Grid


@dataclass(frozen=True, eq=False)
class Reference:
    """What gptqmodel made of a matrix, and the grid it did it on.

    Attributes:
        dense: [out, in], rounded.
        grid: As ours are, with signed levels.
    """

    dense: Tensor
    grid: Grid


def run_gptqmodel(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    damping: float = 0.01,
    mse: bool = False,
) -> Reference:
    """Quantize a float32 matrix [out, in] under a Hessian [in, in], which stays as it is."""
    gptq_class, config_class, _ = import_gptqmodel()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    config = config_class(
        bits=bits,
        group_size=group_size,
        sym=sym,
        damp_percent=damping,
        mse=2.4 if mse else 0.0,
        desc_act=desc_act,
        static_groups=True,
        act_group_aware=False,
        offload_to_disk=False,
        fallback=None,
    )
    gptq = gptq_class(linear, config)
    gptq.quantizer.configure(perchannel=True)
    gptq.H, gptq.nsamples = hessian.float().clone(), 1
    dense, scale, zero_point, *_ = gptq.quantize()
    lowest = -(2.0 ** (bits - 1))
    grid = Grid(scale.clone(), zero_point + lowest, torch.full_like(weight[:, :1], lowest))
    return Reference(dense.clone(), grid)


@cache
def import_gptqmodel() -> tuple[Any, Any, Any]:
    """Return gptqmodel's GPTQ, QuantizeConfig and Quantizer, without its banner, log and environment."""
    import transformers.utils.hub  # noqa: F401 - reads the cache locations before gptqmodel moves them

    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from gptqmodel.quantization import QuantizeConfig
            from gptqmodel.quantization.gptq import GPTQ
            from gptqmodel.quantization.quantizer import Quantizer
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger("logbar").setLevel(logging.CRITICAL)
    return GPTQ, QuantizeConfig, Quantizer
