"""Names in a checkpoint of the projections that one of vLLM's layers computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ercsvd_deploy.exporters.vllm.compatibility import get_current_vllm_config_or_none

_QUERIES_KEYS_VALUES = "qkv_proj"
# for model classes that do not say how they fuse
_USUAL_FUSIONS = {
    _QUERIES_KEYS_VALUES: ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")


def projection_names(prefix: str, published: Sequence[str] | None) -> list[str]:
    """Return the names of the projections in a layer of vLLM's, in its order.

    Args:
        prefix: Name of vLLM's layer.
        published: Last parts of the names by the model's class; None if it does not have them.
    """
    parent, _, leaf = prefix.rpartition(".")
    leaves = published or _USUAL_FUSIONS.get(leaf, [leaf])
    names = [f"{parent}.{projection}" if parent else projection for projection in leaves]
    if leaf == _QUERIES_KEYS_VALUES and len(names) == 3 and _values_are_keys(prefix):
        names[2] = names[1]
    return names


def _values_are_keys(prefix: str) -> bool:
    """Whether vLLM loads a layer's keys also as its values (Gemma 4's full attention)."""
    engine = get_current_vllm_config_or_none()
    number = _LAYER_NUMBER.search(prefix)
    config: Any = (
        None if engine is None or engine.model_config is None else engine.model_config.hf_text_config
    )
    if number is None or not getattr(config, "attention_k_eq_v", False):
        return False
    return bool(config.layer_types[int(number[1])] == "full_attention")
