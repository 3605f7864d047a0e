"""The hub's names of LLaVA's tensors, for writing tiny models and for comparing what is exported."""

from __future__ import annotations

# Prefix of transformers 5 -> prefix on the hub.
_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}


def to_checkpoint(name: str) -> str:
    """Return the hub's name of a tensor, or of a module, that transformers 5 calls `name`."""
    path = f"{name}."  # a prefix may be the whole name of a module
    for module, hub in _PREFIXES.items():
        if path.startswith(module):
            return (hub + path.removeprefix(module)).removesuffix(".")
    return name
