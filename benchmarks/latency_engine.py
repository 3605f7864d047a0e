"""One offline vLLM engine in a process of its own, which times what it is asked on standard input.

`latency.py` and `gpu_serving.py` start it: `python benchmarks/latency_engine.py JSON`, where JSON holds
keyword arguments of `vllm.LLM`. It prints a line when it is ready, with the bytes of the model's tensors, and
then one JSON line for each JSON line it reads: `{"batch", "prompt_tokens", "output_tokens"}` gives
`{"seconds"}`; with `"profile": true` also `{"milliseconds": {operator: self time}}`. End of input ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_VOCABULARY = 32000


def main() -> None:
    """Build the engine and serve requests until standard input ends."""
    # vLLM logs to standard output; the answers keep that stream for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if cores := os.environ.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, {int(core) for core in cores.split()})
    # In this very process, so that a profile sees the operators.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    started = time.monotonic()
    engine = LLM(**json.loads(sys.argv[1]))
    ready = {"ready": round(time.monotonic() - started, 1), "bytes": engine.apply_model(_stored_bytes)[0]}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _profile(engine, request) if request.pop("profile", False) else _time(engine, request)
        print(json.dumps(answer), file=answers, flush=True)


def _stored_bytes(model: Any) -> int:
    """Return the bytes of all tensors of a loaded model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _time(engine: Any, request: dict[str, int]) -> dict[str, float]:
    """Generate once; the prompts' tokens are arbitrary, the outputs of fixed length."""
    from vllm import SamplingParams

    length = request["prompt_tokens"]
    prompts = [
        {"prompt_token_ids": [(997 * row + 13 * column) % _VOCABULARY for column in range(length)]}
        for row in range(request["batch"])
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["output_tokens"], ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return {"seconds": time.perf_counter() - started}


def _profile(engine: Any, request: dict[str, int]) -> dict[str, Any]:
    """Generate once under torch's profiler: self time of each operator on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        answer = _time(engine, request)
    times = {event.key: event.self_cpu_time_total / 1000 for event in recorded.key_averages()}
    return {**answer, "milliseconds": dict(sorted(times.items(), key=lambda item: -item[1])[:20])}


if __name__ == "__main__":
    main()
