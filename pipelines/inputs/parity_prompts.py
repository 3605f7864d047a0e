"""What vLLM and this package are both given, to see whether they compute the same."""

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
_MAX_WINDOWS, _MAX_TOKENS = 4, 512  # of each text: enough to see a wrong kernel, few enough to be quick

Subject = Literal["texts", "pictures"]


@dataclass(frozen=True)
class ParityPrompt:
    """One prompt.

    Attributes:
        subject: What it is about.
        sample: As this package reads it.
        served: As vLLM is given it.
    """

    subject: Subject
    sample: Sample
    served: ServedPrompt


def longest_prompt(config: Any) -> int | None:
    """Return how many tokens a prompt may have so that what is generated fits behind it; None: any number."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return max(2, positions - NUM_DECODED) if isinstance(positions, int) else None


def make_prompts(
    texts: Mapping[str, torch.Tensor], pictures: Sequence[PicturePrompt], config: Any
) -> list[ParityPrompt]:
    """Return the beginnings of every text, and the questions about pictures.

    Args:
        texts: Name -> token ids [windows, tokens].
        pictures: Questions.
        config: The model's, which says how long they may be.
    """
    most = min(_MAX_TOKENS, longest_prompt(config) or _MAX_TOKENS)
    windows = [row for text in texts.values() for row in text[:_MAX_WINDOWS, :most]]
    return [
        *(ParityPrompt("texts", Sample(window), ServedPrompt(window.tolist())) for window in windows),
        *(
            ParityPrompt("pictures", each.sample, ServedPrompt(each.tokens, each.pictures))
            for each in pictures
        ),
    ]
