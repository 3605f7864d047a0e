"""Which models can be compressed, and what a config says of one: found in the model itself, see `discovery`.

Any decoder that transformers builds will do, if its layers' weights are Linears. Written down here is only
where a family differs from what its modules tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.models.architecture import Architecture, ArchitectureError, LayerLinears
from ercsvd_deploy.models.discovery import find_decoder, on_meta
from ercsvd_deploy.models.experts import renamed_parts, stand_in_for_experts
from ercsvd_deploy.models.vision import VISION_LANGUAGE_MODEL_TYPES, check_vision, describe_vision
from ercsvd_deploy.models.vocabulary import find_vocabulary

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Model type -> module -> what checkpoints call it.
_STORED_PREFIXES: Mapping[str, Mapping[str, str]] = {"gpt_neox": {"lm_head": "embed_out"}}


def check_supported(config: Any) -> None:
    """Refuse a config whose model cannot be compressed here, before anything is built from it.

    Raises:
        ArchitectureError: it is not a decoder alone, or its layers or its vision tower are unsupported.
    """
    text_config = config.get_text_config()
    if reads_images(config):
        check_vision(config)
    elif text_config is not config:
        known = ", ".join(sorted(VISION_LANGUAGE_MODEL_TYPES))
        kind = (
            "a vision-language model" if hasattr(config, "vision_config") else "a decoder among other parts"
        )
        raise _unsupported(config, f"{kind}; supported of those: {known}")
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(config, "an encoder with a decoder; supported are decoders alone, such as llama")
    if _model_class(config) is None and not getattr(config, "auto_map", None):
        raise _unsupported(config, "transformers has no language model of this type")
    if not isinstance(getattr(text_config, "num_attention_heads", None), int):
        raise _unsupported(text_config, "it has no attention heads; supported are decoders such as llama")
    for obstacle in _obstacles(text_config):
        raise _unsupported(text_config, obstacle)


def describe(model: nn.Module, config: Any) -> Architecture:
    """Describe the compressible Linears of a model built from `config`.

    Raises:
        ArchitectureError: the model has no layers of Linears, or cannot run.
    """
    text_config = config.get_text_config()
    model = on_meta(model)
    try:
        stand_in_for_experts(model)
        decoder = find_decoder(model, _left_alone(text_config))
    except ArchitectureError as error:
        raise _unsupported(
            text_config, f"{error}; supported are decoders of Linears, such as llama"
        ) from error
    return Architecture(
        model_type=str(config.model_type),
        layers_prefix=decoder.prefix,
        layers=decoder.layers,
        layers_return_tuples=decoder.return_tuples,
        other_tensors=_other_tensors(model, decoder.layers),
        num_attention_heads=text_config.num_attention_heads,
        num_key_value_heads=_num_key_value_heads(text_config),
        vocab_size=text_config.vocab_size,
        vocabulary=find_vocabulary(model, len(decoder.layers)),
        stored_prefixes=_STORED_PREFIXES.get(config.model_type, {}),
        stored_parts=renamed_parts(config),
        image_token_id=config.image_token_index if reads_images(config) else None,
        vision_layers=describe_vision(model, config) if reads_images(config) else {},
    )


def reads_images(config: Any) -> bool:
    """Whether this is the config of a vision-language model."""
    return getattr(config, "model_type", None) in VISION_LANGUAGE_MODEL_TYPES


def module_tensor(config: Any, stored_name: str) -> str:
    """Return the name that transformers' modules have for a tensor of a checkpoint.

    The inverse of `Architecture.checkpoint_name`.
    """
    if reads_images(config):
        return to_module(stored_name)
    for module, stored in _STORED_PREFIXES.get(config.model_type, {}).items():
        if stored_name.startswith(f"{stored}."):
            return module + stored_name.removeprefix(stored)
    for part, stored in renamed_parts(config).items():
        stored_name = stored_name.replace(stored, part)
    return stored_name


def attention_implementation(config: Any) -> str:
    """Return transformers' implementation of attention that computes all that a config asks for.

    Its sdpa leaves out the soft-capping of attention scores, and says nothing.
    """
    has_sdpa = getattr(_model_class(config), "_supports_sdpa", True)
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if has_sdpa and not is_capped else "eager"


def _model_class(config: Any) -> Any:
    """Return transformers' class of the model; None if it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if reads_images(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None)


def _obstacles(text_config: Any) -> Iterator[str]:
    """Yield what of a decoder's layers cannot be compressed, streamed or served here."""
    others = sorted(set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if others:
        yield f"it has layers of another kind than attention: {', '.join(others)}"
    if getattr(text_config, "is_heterogeneous", False):
        yield "its layers have heads of different sizes"
    if getattr(text_config, "num_kv_shared_layers", None):
        yield "layers that read keys and values of others"
    if getattr(text_config, "hidden_size_per_layer_input", None):
        yield "layers that read embeddings of their own"


def _left_alone(text_config: Any) -> frozenset[str]:
    """Return modules of a layer that stay as they are, because vLLM does more with them than load them.

    It multiplies the matrices of latent attention with each other, and sorts rows of Llama 4's.
    """
    if text_config.model_type == "llama4_text":
        return frozenset({"self_attn.q_proj", "self_attn.k_proj"})
    return frozenset({"self_attn"} if getattr(text_config, "kv_lora_rank", None) else ())


def _other_tensors(model: nn.Module, layers: Sequence[LayerLinears]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor but the weights of Linears; experts are as checkpoints have them."""
    weights = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
    separate = {
        layer.experts.name: layer.experts.linears
        for layer in layers
        if layer.experts is not None and layer.experts.groups
    }
    others: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in separate:
            shapes = {
                f"{each.name}.weight": (each.out_features, each.in_features) for each in separate[owner]
            }
            others |= shapes
            separate[owner] = ()  # its other parameters are in these, too
        elif name not in weights:
            others[name] = tuple(parameter.shape)
    return others


def _num_key_value_heads(text_config: Any) -> int:
    if text_config.model_type == "falcon" and not text_config.new_decoder_architecture:
        return 1 if text_config.multi_query else int(text_config.num_attention_heads)
    for key in ("num_key_value_heads", "num_kv_heads"):
        if getattr(text_config, key, None):
            return int(getattr(text_config, key))
    return int(text_config.num_attention_heads)


def _unsupported(config: Any, reason: str) -> ArchitectureError:
    return ArchitectureError(f"model_type {config.model_type!r} is not supported: {reason}")
