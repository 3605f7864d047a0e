"""Ask vLLM in a separate process which kernel it would use: `python -m MODULE REQUEST ANSWER`.

REQUEST is a JSON file {"matrices": [{"shape", "full_shape", "bits", "group_size", "sym"}, ...], "questions":
[{"kind", "capability", "dtype"}, ...]}; ANSWER receives {"vllm": its version, "is_cpu_build": whether answers
about CPUs are those of this machine, "answers": for each question one object for each matrix, {"kernel": name
or null, "padded": shape after padding or null, "reason": why there is no kernel or null}}.

vLLM's platform is replaced by stubs of other accelerators; the process can do nothing else afterwards.
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
    fields = {name: matrix[name] for name in ("bits", "group_size", "sym")}
    try:
        config = compatibility.kernel_config(shape, full_shape, **fields, act_dtype=dtype)
        kernel = compatibility.choose_mp_linear_kernel(config).__name__
    except Exception as error:  # noqa: BLE001 - kernels of other platforms fail in their own ways
        return {"kernel": None, "padded": None, "reason": str(error)}
    missing_operator = compatibility.missing_operator(kernel) if is_here else None
    if missing_operator:
        return {"kernel": None, "padded": None, "reason": f"this build of vLLM has no {missing_operator}"}
    padded = compatibility.padded_shape(kernel, shape, fields["group_size"])
    return {"kernel": kernel, "padded": None if padded == shape else padded, "reason": None}


def main() -> None:
    """Answer one request."""
    request_file, answer_file = (Path(argument) for argument in sys.argv[1:3])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    answer_file.write_text(json.dumps(answer(request)), encoding="utf-8")
    os._exit(0)  # vLLM's exit handlers may fail on a stubbed platform


if __name__ == "__main__":
    main()
