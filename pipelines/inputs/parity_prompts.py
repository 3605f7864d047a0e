"""The prompts that both vLLM and this package compute, to compare their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.exporters.vllm.engines.process import ServedPrompt

if TYPE_CHECKING:
    from ercsvd_deploy.data.pictures import PicturePrompt

NUM_DECODED = 16  # tokens that vLLM generates behind each prompt
NUM_PICTURE_PROMPTS = 8
_MAX_WINDOWS, _MAX_TOKENS = 4, 512  # of each text: enough to detect a wrong kernel, and quick

Subject = Literal["texts", "pictures"]


@dataclass(frozen=True)
class ParityPrompt:
    """One prompt.

    Attributes:
        subject: Whether it is about texts or pictures.
        sample: The prompt as this package reads it.
        served: The prompt as vLLM receives it.
    """

    subject: Subject
    sample: Sample
    served: ServedPrompt


def longest_prompt(config: Any) -> int | None:
    """Return the largest number of prompt tokens that leaves room for the generated ones; None: no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return max(2, positions - NUM_DECODED) if isinstance(positions, int) else None


def make_prompts(
    texts: Mapping[str, torch.Tensor], pictures: Sequence[PicturePrompt], config: Any
) -> list[ParityPrompt]:
    """Return the first windows of every text, and the questions about pictures, as prompts.

    Args:
        texts: Name -> token ids [windows, tokens].
        pictures: Questions about pictures.
        config: The model's config, which limits their length.
    """
    max_tokens = min(_MAX_TOKENS, longest_prompt(config) or _MAX_TOKENS)
    windows = [row for text in texts.values() for row in text[:_MAX_WINDOWS, :max_tokens]]
    return [
        *(ParityPrompt("texts", Sample(window), ServedPrompt(window.tolist())) for window in windows),
        *(
            ParityPrompt("pictures", question.sample, ServedPrompt(question.tokens, question.pictures))
            for question in pictures
        ),
    ]
