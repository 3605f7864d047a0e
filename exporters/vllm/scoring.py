"""Score tokens with vLLM, in a process of its own: `python -m ...prompt_logprobs REQUEST ANSWER`.

REQUEST is a JSON file {"engine": keyword arguments of `vllm.LLM`, "prompts": lists of token ids}; ANSWER
receives {"vllm": its version, "logprobs": for each prompt the log-probability of every token but the first}.
vLLM keeps memory and processes until its own process ends, hence the separate one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def score(engine: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Return what vLLM thinks of every token of the prompts."""
    import vllm

    llm = vllm.LLM(disable_log_stats=True, **engine)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    logprobs = [
        [
            position[token].logprob
            for token, position in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    return {"vllm": vllm.__version__, "logprobs": logprobs}


def main() -> None:
    """Answer one request."""
    request, answer = (Path(argument) for argument in sys.argv[1:3])
    asked = json.loads(request.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(score(asked["engine"], asked["prompts"])), encoding="utf-8")
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
