"""Check whether a model can be compressed, and describe it; most is found in the model, see `discovery`.

Any decoder that transformers builds is supported if its layers' weights are Linears. This module only lists
differences of families that cannot be found in their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ercsvd_deploy.models.checkpoints.names import module_names, stored_prefixes
from ercsvd_deploy.models.description.architecture import Architecture, ArchitectureError, LayerLinears
from ercsvd_deploy.models.description.discovery import find_decoder, on_meta
from ercsvd_deploy.models.description.tasks import auto_class, task_of
from ercsvd_deploy.models.description.vision import (
    describe_vision,
    find_vision_parts,
    image_token_id,
    reads_images,
)
from ercsvd_deploy.models.description.vocabulary import find_vocabulary
from ercsvd_deploy.models.experts.routed import renamed_parts, stand_in_for_experts

_BOTH_DIRECTIONS = "it reads a text in both directions; supported are decoders, which read it in one"
_ATTENTION_LAYERS = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
)
_LINEAR_ATTENTION = "linear_attention"
# Gates of linear attention: one or two outputs for each head, which control how its state changes.
_GATES_OF_STATES = frozenset({"linear_attn.in_proj_ba", "linear_attn.in_proj_b", "linear_attn.in_proj_a"})
# Model type -> module -> its name in checkpoints.
_STORED_PREFIXES: Mapping[str, Mapping[str, str]] = {"gpt_neox": {"lm_head": "embed_out"}}


def check_supported(config: Any) -> None:
    """Refuse a config whose model cannot be compressed, before the model is built.

    Raises:
        ArchitectureError: the model is neither a decoder nor a vision-language model with one, or has
            unsupported layers.
    """
    text_config = config.get_text_config()
    if reads_images(config):
        image_token_id(config)  # raises if the config names none
    elif text_config is not config:
        raise _unsupported(config, "a decoder among other parts, which are not those of a model that sees")
    if not getattr(config, "is_causal", True):
        raise _unsupported(config, _BOTH_DIRECTIONS)
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
    is_vision_model = reads_images(config)
    if not is_vision_model and any(not getattr(module, "is_causal", True) for module in model.modules()):
        raise _unsupported(config, _BOTH_DIRECTIONS)
    try:
        stand_in_for_experts(model)
        decoder = find_decoder(model, _left_alone(text_config))
    except ArchitectureError as error:
        raise _unsupported(
            text_config, f"{error}; supported are decoders of Linears, such as llama"
        ) from error
    key_value_heads = [_num_key_value_heads(text_config, layer.index) for layer in decoder.layers]
    return Architecture(
        model_type=str(config.model_type),
        text_model_type=str(text_config.model_type),
        task=task_of(config),
        layers_prefix=decoder.prefix,
        layers=decoder.layers,
        num_layer_outputs=decoder.num_outputs,
        other_tensors=_other_tensors(model, decoder.layers),
        num_attention_heads=text_config.num_attention_heads,
        num_key_value_heads=key_value_heads[0],
        other_key_value_heads={
            layer.prefix: heads
            for layer, heads in zip(decoder.layers, key_value_heads, strict=True)
            if heads != key_value_heads[0]
        },
        linear_key_size=_linear_key_size(text_config),
        vocab_size=text_config.vocab_size,
        vocabulary=find_vocabulary(model, len(decoder.layers)),
        stored_prefixes=(
            stored_prefixes(model) if is_vision_model else _STORED_PREFIXES.get(config.model_type, {})
        ),
        stored_parts=renamed_parts(config),
        image_token_id=image_token_id(config) if is_vision_model else None,
        vision_parts=find_vision_parts(model) if is_vision_model else {},
        vision_layers=describe_vision(model, config) if is_vision_model else {},
    )


def module_tensors(model: nn.Module, config: Any) -> Callable[[str], str]:
    """Return a function that turns the name of a checkpoint's tensor into that of transformers' modules.

    It is the inverse of `Architecture.checkpoint_name`.
    """
    if reads_images(config):
        return module_names(model)
    if task_of(config) == "embed":  # the decoder of a whole language model, or saved alone
        return lambda name: name.removeprefix(f"{model.base_model_prefix}.")
    prefixes, parts = _STORED_PREFIXES.get(config.model_type, {}), renamed_parts(config)

    def module_name(stored_name: str) -> str:
        for module, stored in prefixes.items():
            if stored_name.startswith(f"{stored}."):
                return module + stored_name.removeprefix(stored)
        for part, stored in parts.items():
            stored_name = stored_name.replace(stored, part)
        return stored_name

    return module_name


def attention_implementation(config: Any) -> str:
    """Return the fastest implementation of attention in transformers that is correct for a config.

    Its sdpa ignores the soft-capping of attention scores.
    """
    has_sdpa = getattr(_model_class(config), "_supports_sdpa", True)
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if has_sdpa and not is_capped else "eager"


def _model_class(config: Any) -> Any:
    """Return transformers' class of the model; None if it has none."""
    return auto_class(config)._model_mapping.get(type(config), None)


def _obstacles(text_config: Any) -> Iterator[str]:
    """Yield descriptions of layers that cannot be compressed, streamed or served."""
    supported = _ATTENTION_LAYERS | ({_LINEAR_ATTENTION} if _linear_key_size(text_config) else set())
    unsupported = sorted(set(getattr(text_config, "layer_types", None) or ()) - supported)
    if unsupported:
        kinds = (
            f"{kind} without keys, such as Mamba" if kind == _LINEAR_ATTENTION else kind
            for kind in unsupported
        )
        yield f"it has layers of another kind than attention: {', '.join(kinds)}"
    if getattr(text_config, "cross_attention_layers", None):
        yield (
            "layers that attend to the features of pictures, beside those that attend to tokens; vLLM has "
            "dropped such models, too"
        )
    if "shared" in (getattr(text_config, "indexer_types", None) or ()):
        yield "layers that attend to the tokens that another layer has chosen"
    if getattr(text_config, "num_kv_shared_layers", None):
        yield "layers that read keys and values of others"
    if getattr(text_config, "hidden_size_per_layer_input", None):
        yield "layers that read embeddings of their own"


def _left_alone(text_config: Any) -> frozenset[str]:
    """Return the modules of a layer that stay unchanged.

    vLLM multiplies the matrices of latent attention with each other, and sorts rows of Llama 4's. Gates of
    linear attention are small, and their errors accumulate from token to token.
    """
    if text_config.model_type == "llama4_text":
        return frozenset({"self_attn.q_proj", "self_attn.k_proj"})
    return _GATES_OF_STATES | ({"self_attn"} if getattr(text_config, "kv_lora_rank", None) else set())


def _other_tensors(model: nn.Module, layers: Sequence[LayerLinears]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors but the weights of Linears; experts as checkpoints store them."""
    weights = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
    separate = {
        layer.experts.name: layer.experts.linears
        for layer in layers
        if layer.experts is not None and layer.experts.groups
    }
    shape_by_name: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in separate:
            shapes = {
                f"{linear.name}.weight": (linear.out_features, linear.in_features)
                for linear in separate[owner]
            }
            shape_by_name |= shapes
            separate[owner] = ()  # the module's other parameters are included
        elif name not in weights:
            shape_by_name[name] = tuple(parameter.shape)
    return shape_by_name


def _num_key_value_heads(text_config: Any, layer: int) -> int:
    if getattr(text_config, "is_heterogeneous", False):  # without a number for all layers
        text_config = text_config.per_layer_config[layer]
    if text_config.model_type == "falcon" and not text_config.new_decoder_architecture:
        return 1 if text_config.multi_query else int(text_config.num_attention_heads)
    for key in ("num_key_value_heads", "num_kv_heads"):
        if getattr(text_config, key, None):
            return int(getattr(text_config, key))
    return int(text_config.num_attention_heads)


def _linear_key_size(text_config: Any) -> int:
    """Return the number of outputs of all keys of a gated delta net; 0 for Mamba, which has no keys."""
    if _LINEAR_ATTENTION not in (getattr(text_config, "layer_types", None) or ()):
        return 0
    heads, size = (getattr(text_config, f"linear_{key}", 0) for key in ("num_key_heads", "key_head_dim"))
    return int(heads) * int(size)


def _unsupported(config: Any, reason: str) -> ArchitectureError:
    return ArchitectureError(f"model_type {config.model_type!r} is not supported: {reason}")
