"""Score and continue prompts with vLLM in a separate process: `python -m MODULE REQUEST ANSWER`.

REQUEST is a JSON file {"engine": keyword arguments of `vllm.LLM`, "prompts": a list of {"tokens": ids, one
image token for each picture, "images": files of pictures}, "num_decoded": tokens to generate for each}.
ANSWER receives the return value of `score`. vLLM keeps memory and processes until its process ends, hence the
separate one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def score(engine: dict[str, Any], prompts: list[dict[str, Any]], num_decoded: int) -> dict[str, Any]:
    """Return vLLM's log-probabilities of all tokens of the prompts and of their greedy continuations.

    Returns:
        {"vllm": its version, "compiled": whether torch.compile is used, "cuda_graphs": whether they are,
        "outputs": for each prompt {"prompt": the ids that vLLM read, a token for each image feature,
        "prompt_logprobs": of all of them but the first, "decoded": the ids it generated, "decoded_logprobs":
        of those}}.
    """
    import vllm

    gc.freeze()  # an engine collects garbage seven times: imported objects need not be searched
    llm = vllm.LLM(disable_log_stats=True, **engine)
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=num_decoded,
        ignore_eos=True,  # compare the same number of steps for every prompt
        logprobs=0,  # of the chosen token only
        prompt_logprobs=0,
        detokenize=False,
    )
    outputs = llm.generate([_request(prompt) for prompt in prompts], sampling, use_tqdm=False)
    compilation = llm.llm_engine.vllm_config.compilation_config
    answer = {
        "vllm": vllm.__version__,
        "compiled": int(compilation.mode or 0) > 0,
        "cuda_graphs": compilation.cudagraph_mode.name != "NONE"
        and bool(compilation.cudagraph_capture_sizes),
        "outputs": [
            {
                "prompt": list(output.prompt_token_ids),
                "prompt_logprobs": _logprobs(output.prompt_token_ids[1:], output.prompt_logprobs[1:]),
                "decoded": list(output.outputs[0].token_ids),
                "decoded_logprobs": _logprobs(output.outputs[0].token_ids, output.outputs[0].logprobs),
            }
            for output in outputs
        ],
    }
    llm.llm_engine.engine_core.shutdown()
    return answer


def _request(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt in vLLM's format."""
    if not prompt["images"]:
        return {"prompt_token_ids": prompt["tokens"]}
    from PIL import Image

    pictures = [Image.open(file).convert("RGB") for file in prompt["images"]]
    return {"prompt_token_ids": prompt["tokens"], "multi_modal_data": {"image": pictures}}


def _logprobs(tokens: Any, positions: Any) -> list[float]:
    """Return the log-probability of each position's token."""
    return [position[token].logprob for token, position in zip(tokens, positions, strict=True)]


def main() -> None:
    """Answer one request."""
    request_file, answer_file = (Path(argument) for argument in sys.argv[1:3])
    request = json.loads(request_file.read_text(encoding="utf-8"))
    answer = score(request["engine"], request["prompts"], request["num_decoded"])
    answer_file.write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
