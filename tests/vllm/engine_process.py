"""Runs vLLM engines in a process of their own, by a JSON request on stdin.

The request lists engines, built one after the other, and what each is to generate; the answer is written to a
file as JSON. Only the standard library, vLLM and, for pictures, PIL are imported here, so that the
interpreter of another environment (another vLLM release) can run it too.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def generate(
    engine: dict[str, Any], prompts: list[list[int] | dict[str, Any]], max_tokens: int, top: int
) -> dict[str, Any]:
    """Build an engine, generate greedily, shut it down.

    Args:
        engine: keyword arguments of `vllm.LLM`.
        prompts: token ids, or {"tokens": ids with one image token a picture, "images": files}.
        max_tokens: how many tokens to generate for each prompt, end-of-sequence tokens included.
        top: how many log-probabilities to return for each position after the first.

    Returns:
        {"compiled": whether torch.compile was used, "cut": Linear of the checkpoint -> vLLM's class of the
        layer that holds it (of an engine of one rank), "outputs": for each prompt {"prompt": the ids that
        were read, with a token for each image feature, "tokens": the generated ids, "logprobs": for each
        position of prompt and output but the first, token id -> log-probability}}.
    """
    from vllm import LLM, SamplingParams

    gc.freeze()  # an engine collects garbage seven times: what is there before it need not be searched
    llm = LLM(max_model_len=128, max_num_seqs=8, disable_log_stats=True, **engine)
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=top,
        prompt_logprobs=top,
        detokenize=False,
    )
    outputs = llm.generate([_request(prompt) for prompt in prompts], sampling, use_tqdm=False)
    compiled = int(llm.llm_engine.vllm_config.compilation_config.mode or 0) > 0
    cut = llm.apply_model(_classes_of_linears)[0] if engine["tensor_parallel_size"] == 1 else {}
    llm.llm_engine.engine_core.shutdown()
    return {
        "compiled": compiled,
        "cut": cut,
        "outputs": [
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [
                    {str(token): entry.logprob for token, entry in position.items()}
                    for position in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
                ],
            }
            for output in outputs
        ],
    }


def _classes_of_linears(model: Any) -> dict[str, str]:
    """Return Linear of the checkpoint -> class of the layer that holds it, of the layers that we serve."""
    return {
        name: type(module).__name__
        for module in model.modules()
        for name, _ in getattr(getattr(module, "quant_method", None), "_described", ())
    }


def _request(prompt: list[int] | dict[str, Any]) -> dict[str, Any]:
    """Return a prompt as vLLM takes it."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in prompt["images"]]
    return {"prompt_token_ids": prompt["tokens"], "multi_modal_data": {"image": images}}


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    answers = []
    for engine in request["engines"]:
        try:
            answers.append(generate(engine, request["prompts"], request["max_tokens"], request["top"]))
        except Exception as error:
            if not request["goes_on"]:
                raise
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(request["answer"]).write_text(json.dumps(answers))
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
