"""Models whose input embedding or output layer vLLM cannot load as integers; no vLLM needed.

vLLM gives these layers no quantization method: they are built plain, and cannot load integers. Tests compare
the lists with vLLM's sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture

# Values of transformers' model_type.
PLAIN_EMBEDDINGS = frozenset(
    {
        *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "granitemoe", "gptj", "mixtral"),
        *("glm4_moe", "gpt_oss", "nemotron", "opt", "qwen3_next"),
        *("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    }
)
PLAIN_OUTPUT_LAYERS = frozenset({"bloom", "gpt_oss", "opt", "qwen3_next"})


def find_unservable_vocabulary(names: Iterable[str], architecture: Architecture) -> list[str]:
    """Return one line for every embedding or output layer that vLLM would build plain.

    Args:
        names: Names of the layers that the plan quantizes.
        architecture: The model's architecture.
    """
    vocabulary, model_type = architecture.vocabulary, architecture.text_model_type
    problems = []
    for name in names:
        is_looked_up = vocabulary.embedding is not None and name == vocabulary.embedding.name
        if is_looked_up and model_type in PLAIN_EMBEDDINGS:
            problems.append(f"{name}: vLLM has no integers for the input embeddings of {model_type} models")
        elif not is_looked_up and model_type in PLAIN_OUTPUT_LAYERS:
            problems.append(f"{name}: vLLM has no integers for the output layers of {model_type} models")
    return problems
