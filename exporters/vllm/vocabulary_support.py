"""Which of vLLM's models let an input embedding or an output layer be integers; no vLLM needed.

The others do not hand it to a quantization method: it is built plain, and cannot load integers. Tests compare
what is listed here with vLLM's sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ercsvd_deploy.models.architecture import Architecture

# Types of models, as transformers has them.
PLAIN_EMBEDDINGS = frozenset(
    {
        *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "granitemoe", "gptj", "mixtral"),
        *("glm4_moe", "gpt_oss", "nemotron", "opt"),
    }
)
PLAIN_OUTPUT_LAYERS = frozenset({"bloom", "gpt_oss", "opt"})


def find_unservable_vocabulary(names: Iterable[str], architecture: Architecture) -> list[str]:
    """Return one line for every embedding or output layer that vLLM would build plain.

    Args:
        names: Those that are to become integers.
        architecture: The model's.
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
