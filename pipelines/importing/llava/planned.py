"""The config that a LLaVA checkpoint in its authors' format will have once it is converted, for plans.

The tower's config and the tokenizer are files of others than the checkpoint's config. The two towers that
published checkpoints name are known; a tokenizer gets two tokens at most, for pictures and for padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.pipelines.importing.llava.config import interpret, padded_vocab_size

_MOST_NEW_TOKENS = 2
_SIDES = {"openai/clip-vit-large-patch14-336": 336, "openai/clip-vit-large-patch14": 224}
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_MARK = "planned_before_import"  # attribute of a config that no file has


def expected_config(raw: Mapping[str, Any], path: Path) -> Any | None:
    """Return the config of the converted model; None if its vision tower is not supported.

    Args:
        raw: Contents of the original's config.json.
        path: Path of that file, for error messages.

    Raises:
        LlavaImportError: something in it cannot be converted.
    """
    from transformers import CLIPVisionConfig

    original = interpret(raw, path)
    side = _SIDES.get(original.vision_tower or "")
    if side is None:
        return None
    dtype = getattr(torch, str(raw.get("torch_dtype", "float16")), None)
    num_rows = original.text_config.vocab_size
    config = original.as_transformers(
        CLIPVisionConfig(**_CLIP_LARGE, image_size=side),
        vocab_size=padded_vocab_size(num_rows + _MOST_NEW_TOKENS),
        image_token_id=num_rows,
        pad_token_id=num_rows + 1,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float16,
    )
    setattr(config, _MARK, True)
    return config


def import_note(config: Any, source: str) -> tuple[str, ...]:
    """Return a note on how to convert a model planned by `expected_config` before a run; else none."""
    if not getattr(config, _MARK, False):
        return ()
    return (
        "planned is the model in the hub's layout: before a run, convert the checkpoint once, with  "
        f"ercsvd import-llava {source} DIRECTORY  (which takes safetensors, and of conversations "
        "only Vicuna's and Mistral's forms), and set model.path to DIRECTORY",
    )
