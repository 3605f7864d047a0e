"""The names of LLaVA's tensors in checkpoints and in transformers 5.

Four layouts are in circulation. Checkpoints on the hub use one that every version of transformers and vLLM
load, so this package writes it; all others are read.

    part            hub (written)                transformers 5                 original (llava_llama)
    decoder         language_model.model.        model.language_model.          model.
    output layer    language_model.lm_head.      lm_head.                       lm_head.
    vision tower    vision_tower.vision_model.   model.vision_tower.            model.vision_tower.
                                                                                vision_tower.vision_model.
    projector       multi_modal_projector.       model.multi_modal_projector.   model.mm_projector.
    row separator   image_newline                model.image_newline            model.image_newline

The fourth is a mixture that some versions of transformers wrote: the hub's names of tower and projector
behind `model.`, or with the tower's `vision_model.` left out. vLLM's own module names are the hub's.
"""

from __future__ import annotations

LANGUAGE_MODEL = "model.language_model."
VISION_TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."

# Module prefix -> checkpoint prefixes, the hub's first.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LANGUAGE_MODEL, ("language_model.model.", LANGUAGE_MODEL)),
    ("lm_head.", ("language_model.lm_head.", "model.language_model.lm_head.", "lm_head.")),
    (
        VISION_TOWER,
        ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.", VISION_TOWER),
    ),
    (PROJECTOR, ("multi_modal_projector.", PROJECTOR)),
    ("model.image_newline", ("image_newline", "model.image_newline")),
)
_ORIGINAL_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.vision_tower.vision_tower.vision_model.", VISION_TOWER),
    ("model.mm_projector.", PROJECTOR),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", LANGUAGE_MODEL),
)
# The original projector is a Sequential: Linear, GELU, Linear; or one Linear alone.
_ORIGINAL_PROJECTOR_PARTS = {"0.": "linear_1.", "2.": "linear_2."}


def to_module(name: str) -> str:
    """Return the name that transformers 5 gives to a tensor of a checkpoint in any layout but the original.

    Names of any other part are returned unchanged.
    """
    prefixes = [(checkpoint_prefix, module) for module, layouts in _PREFIXES for checkpoint_prefix in layouts]
    for checkpoint_prefix, module in sorted(prefixes, key=lambda pair: -len(pair[0])):
        if name.startswith(checkpoint_prefix):
            return module + name.removeprefix(checkpoint_prefix)
    return name


def from_original(name: str) -> str:
    """Return the name that transformers 5 gives to a tensor of an original (`llava_llama`) checkpoint."""
    for original, module in _ORIGINAL_PREFIXES:
        if name.startswith(original):
            local_name = name.removeprefix(original)
            if module == PROJECTOR:
                part = next((part for part in _ORIGINAL_PROJECTOR_PARTS if local_name.startswith(part)), "")
                local_name = _ORIGINAL_PROJECTOR_PARTS.get(part, "") + local_name.removeprefix(part)
            return module + local_name
    return name
