"""Ask vLLM which kernel it would use, in a process of its own: `python -m MODULE REQUEST ANSWER`.

REQUEST is a JSON file {"matrices": [{"shape", "full_shape", "bits", "group_size", "sym"}, ...], "questions":
[{"kind", "capability", "dtype"}, ...]}; ANSWER receives {"vllm": its version, "is_cpu_build": whether the CPU
that was asked about is this machine's, "answers": for each question one object for each matrix, {"kernel":
name or null, "padded": shape that it is filled up to or null, "reason": why there is none or null}}.

vLLM is made to believe in other accelerators for it, which no process survives that does anything else.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ercsvd_deploy.exporters.vllm import compatibility
from ercsvd_deploy.exporters.vllm.kernels.stubbed_platform import Accelerator, StubbedPlatform


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's choice for every matrix on every accelerator."""
    import torch
    import vllm

    platform = StubbedPlatform()
    answers = []
    for question in request["questions"]:
        capability = question["capability"]
        accelerator = Accelerator(question["kind"], tuple(capability) if capability else None)
        platform.become(accelerator)
        dtype = getattr(torch, question["dtype"])
        is_here = accelerator.kind == "CPU" and platform.is_cpu_build
        answers.append([_choose(matrix, dtype, is_here=is_here) for matrix in request["matrices"]])
    return {"vllm": vllm.__version__, "is_cpu_build": platform.is_cpu_build, "answers": answers}


def _choose(matrix: dict[str, Any], dtype: Any, *, is_here: bool) -> dict[str, Any]:
    shape, full_shape = tuple(matrix["shape"]), tuple(matrix["full_shape"])
    kind = {name: matrix[name] for name in ("bits", "group_size", "sym")}
    try:
        config = compatibility.kernel_config(shape, full_shape, **kind, act_dtype=dtype)
        kernel = compatibility.choose_mp_linear_kernel(config).__name__
    except Exception as error:  # noqa: BLE001 - kernels of other platforms fail in their own ways
        return {"kernel": None, "padded": None, "reason": str(error)}
    missing = compatibility.missing_operator(kernel) if is_here else None
    if missing:
        return {"kernel": None, "padded": None, "reason": f"this build of vLLM has no {missing}"}
    padded = compatibility.padded_shape(kernel, shape, kind["group_size"])
    return {"kernel": kernel, "padded": None if padded == shape else padded, "reason": None}


def main() -> None:
    """Answer one request."""
    request, reply = (Path(argument) for argument in sys.argv[1:3])
    asked = json.loads(request.read_text(encoding="utf-8"))
    reply.write_text(json.dumps(answer(asked)), encoding="utf-8")
    os._exit(0)  # nothing of a misled vLLM is worth an orderly end


if __name__ == "__main__":
    main()
