"""The greedy answers of an offline vLLM engine, with which `soak.py` compares those of the server.

`soak.py` starts it: `python benchmarks/soak_offline.py REQUEST ANSWER`. REQUEST is a JSON file {"engine":
keyword arguments of `vllm.LLM`, "prompts": texts, "adapters": {name: directory, or null for the model alone},
"max_tokens", "top"}. ANSWER receives {name: for each prompt {"tokens": ids, "logprobs": for each of them {id:
log-probability} of the `top` likeliest}}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(asked: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return every model's greedy answers to every prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**asked["engine"], disable_log_stats=True)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["max_tokens"], logprobs=asked["top"], detokenize=False
    )
    answers = {}
    for number, (name, adapter) in enumerate(asked["adapters"].items(), start=1):
        lora_request = None if adapter is None else LoRARequest(name, number, adapter)
        outputs = engine.generate(asked["prompts"], sampling, use_tqdm=False, lora_request=lora_request)
        completions = [output.outputs[0] for output in outputs]
        answers[name] = [
            {
                "tokens": list(completion.token_ids),
                "logprobs": [
                    {token: entry.logprob for token, entry in position.items()}
                    for position in completion.logprobs
                ],
            }
            for completion in completions
        ]
    engine.llm_engine.engine_core.shutdown()
    return answers


def main() -> None:
    """Answer one request."""
    request, answer_file = (Path(argument) for argument in sys.argv[1:3])
    answer_file.write_text(json.dumps(answer(json.loads(request.read_text()))))
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
