"""Runs vLLM engines in a process of their own, by a JSON request on stdin.

The request lists engines, built one after the other, and what each is to read, all the same unless an engine
has `prompts` of its own; one whose `runner` is pooling pools them. The answer is written to a file as JSON.
Only the standard library, vLLM and, for pictures, PIL are imported here, so that the interpreter of another
environment (another vLLM release) can run it too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

_IS_FORK = "vllm" in sys.modules  # of `tests.forks`, where it was imported


def generate(
    engine: dict[str, Any],
    prompts: list[list[int] | dict[str, Any]],
    max_tokens: int,
    top: int,
    *,
    scores_prompts: bool,
) -> dict[str, Any]:
    """Build an engine, generate greedily, shut it down.

    Args:
        engine: keyword arguments of `vllm.LLM`.
        prompts: token ids, or {"tokens": ids with one image token a picture, "images": files, "adapter":
            directory of the LoRA adapter to use}, of which the last two may be left out.
        max_tokens: how many tokens to generate for each prompt, end-of-sequence tokens included.
        top: how many log-probabilities to return for each position after the first.
        scores_prompts: whether those of the prompt are returned too; vLLM then computes all of it, whatever
            its prefix cache holds.

    Returns:
        {"compiled": whether torch.compile was used, "cut": Linear of the checkpoint -> vLLM's class of the
        layer that holds it (of an engine of one worker), "accepted": how many tokens of a speculator were
        accepted (where the engine keeps statistics), "outputs": for each prompt {"prompt": the ids that
        were read, with a token for each image feature, "cached": how many of them the prefix cache held,
        "tokens": the generated ids, "logprobs": for each position of prompt, if scored, and output but the
        first, token id -> log-probability}}.
    """
    from vllm import SamplingParams

    gc.freeze()  # an engine collects garbage seven times: what is there before it need not be searched
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=top,
        prompt_logprobs=top if scores_prompts else None,
        detokenize=False,
    )
    with _started(engine) as llm:
        outputs = llm.generate(
            [_request(prompt) for prompt in prompts],
            sampling,
            use_tqdm=False,
            lora_request=_adapters(prompts),
        )
        parallel = llm.llm_engine.vllm_config.parallel_config
        return {
            "compiled": int(llm.llm_engine.vllm_config.compilation_config.mode or 0) > 0,
            "cut": llm.apply_model(_classes_of_linears)[0] if parallel.world_size == 1 else {},
            "accepted": None if engine.get("disable_log_stats", True) else _num_accepted(llm),
            "outputs": [
                {
                    "prompt": list(output.prompt_token_ids),
                    "cached": output.num_cached_tokens,
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        {str(token): entry.logprob for token, entry in position.items()}
                        for position in [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
                    ],
                }
                for output in outputs
            ],
        }


def pool(engine: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Build an engine of the pooling runner; return its "outputs": for each prompt a vector, or scores.

    Args:
        engine: keyword arguments of `vllm.LLM`.
        prompts: token ids.
    """
    with _started(engine) as llm:
        task = "embed" if "embed" in llm.supported_tasks else "classify"
        outputs = llm.encode([_request(prompt) for prompt in prompts], pooling_task=task, use_tqdm=False)
        return {"outputs": [output.outputs.data.float().tolist() for output in outputs]}


@contextlib.contextmanager
def _started(engine: dict[str, Any]) -> Iterator[Any]:
    """Build an engine, and shut it down, with the processes of its workers, whatever happens."""
    from vllm import LLM

    llm = LLM(**{"max_model_len": 128, "max_num_seqs": 8, "disable_log_stats": True} | engine)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _classes_of_linears(model: Any) -> dict[str, str]:
    """Return Linear of the checkpoint -> class of the layer that holds it, of the layers that we serve."""
    return {
        name: type(module).__name__
        for module in model.modules()
        for name, _ in getattr(getattr(module, "quant_method", None), "_described", ())
    }


def _request(prompt: list[int] | dict[str, Any]) -> dict[str, Any]:
    """Return a prompt as vLLM takes it."""
    if isinstance(prompt, list) or "images" not in prompt:
        return {"prompt_token_ids": prompt if isinstance(prompt, list) else prompt["tokens"]}
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in prompt["images"]]
    return {"prompt_token_ids": prompt["tokens"], "multi_modal_data": {"image": images}}


def _adapters(prompts: list[list[int] | dict[str, Any]]) -> list[Any] | None:
    """Return each prompt's LoRA adapter as vLLM takes it, or None if no prompt has one."""
    directories = [None if isinstance(prompt, list) else prompt.get("adapter") for prompt in prompts]
    if not any(directories):
        return None
    from vllm.lora.request import LoRARequest

    numbers = {directory: number for number, directory in enumerate(filter(None, directories), start=1)}
    return [
        None if directory is None else LoRARequest(directory, numbers[directory], directory)
        for directory in directories
    ]


def _num_accepted(llm: Any) -> int:
    """Return how many tokens that a speculator proposed the engine has accepted."""
    accepted = "vllm:spec_decode_num_accepted_tokens"
    return sum(metric.value for metric in llm.get_metrics() if metric.name == accepted)


def _fork_workers() -> None:
    """Fork workers; spawned, each would import vLLM for itself.

    Off this process if it is a fork that has computed nothing, off one that has imported vLLM if it is not.
    """
    from vllm.v1.executor import multiproc_executor

    context: Any = multiprocessing.get_context("fork" if _IS_FORK else "forkserver")
    if not _IS_FORK:
        context.set_forkserver_preload(
            ["vllm", "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker"]
        )
    multiproc_executor.get_mp_context = lambda: context


def main() -> None:
    """Answer the request on stdin."""
    answer(json.load(sys.stdin))


def answer(request: dict[str, Any]) -> NoReturn:
    """Build a request's engines, write what they answer, and end this process."""
    if any(engine.get("distributed_executor_backend") == "mp" for engine in request["engines"]):
        _fork_workers()
    answers = []
    for engine in request["engines"]:
        try:
            if engine.get("runner") == "pooling":
                answers.append(pool(engine, engine.pop("prompts", request["prompts"])))
                continue
            answers.append(
                generate(
                    engine,
                    engine.pop("prompts", request["prompts"]),
                    request["max_tokens"],
                    request["top"],
                    scores_prompts=request["scores_prompts"],
                )
            )
        except Exception as error:
            if not request["goes_on"]:
                raise
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(request["answer"]).write_text(json.dumps(answers))
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
