"""What answers in the place of vLLM: transformers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.exporters.vllm.engines.failure import EngineFailure
from ercsvd_deploy.exporters.vllm.engines.process import EngineError, ServedPrompt

FOUND = "RuntimeError: no kernel for this\nshape: [3, 5]"


@torch.no_grad()
def continue_naively(model: PreTrainedModel, prompt: Sequence[int], num_decoded: int) -> dict[str, Any]:
    """Answer as `served_logprobs.score` does, token by token, with transformers' own model in full."""
    tokens = list(prompt)
    for _ in range(num_decoded):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    of_tokens = [float(logprobs[place - 1, tokens[place]]) for place in range(1, len(tokens))]
    border = len(prompt) - 1
    return {
        "prompt": tokens[: border + 1],
        "prompt_logprobs": of_tokens[:border],
        "decoded": tokens[border + 1 :],
        "decoded_logprobs": of_tokens[border:],
    }


class StandIn:
    """In vLLM's place: computes with transformers, and notes how it was asked.

    Attributes:
        asked: Arguments of every engine.
        fails_at: Tensor-parallel sizes at which it fails.
        error: Added to the log-probability of every decoded token.
    """

    def __init__(self, fails_at: Sequence[int] = (), error: float = 0.0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.environments: list[Mapping[str, str]] = []
        self.fails_at = fails_at
        self.error = error
        self.before: Callable[[], None] = lambda: None

    def __call__(
        self,
        engine: Mapping[str, Any],
        prompts: Sequence[ServedPrompt],
        num_decoded: int,
        *,
        environment: Mapping[str, str],
        log: Path,
    ) -> dict[str, Any]:
        self.before()
        self.asked.append(dict(engine) | {"prompts": prompts})
        self.environments.append(environment)
        with log.open("a") as printed:
            printed.write("what vLLM printed\n")
        if engine["tensor_parallel_size"] in self.fails_at:
            raise EngineError(EngineFailure("Worker_TP1", FOUND, "Traceback ...\n  <frame>\n" + FOUND))
        outputs = self.answer(str(engine["model"]), prompts, num_decoded)
        assert max(len(output["prompt"]) for output in outputs) + num_decoded == engine["max_model_len"]
        return {"vllm": "0.0", "compiled": True, "cuda_graphs": False, "outputs": outputs}

    def answer(self, model: str, prompts: Sequence[ServedPrompt], num_decoded: int) -> list[dict[str, Any]]:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        outputs = [continue_naively(loaded, prompt.tokens, num_decoded) for prompt in prompts]
        for output in outputs:
            output["decoded_logprobs"] = [value + self.error for value in output["decoded_logprobs"]]
        return outputs
