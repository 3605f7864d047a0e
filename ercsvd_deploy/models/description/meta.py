"""Read a model's config, and build the model from it on the meta device: modules and shapes, no weights."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.models.compressed.packed_embedding import TiedOutputLayer
from ercsvd_deploy.models.description.architecture import Architecture, ArchitectureError
from ercsvd_deploy.models.description.config_sizes import impossible_sizes
from ercsvd_deploy.models.description.families import attention_implementation, check_supported, describe
from ercsvd_deploy.models.description.tasks import auto_class, mark_embedding_model

_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})
_LARGEST_BUFFER = 2**26  # elements


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a hub id or directory.

    Raises:
        ArchitectureError: the config is missing, malformed, of an unknown architecture or of absurd size.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ArchitectureError(f"{path}: no config.json; is this a Hugging Face model directory?")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        problems = impossible_sizes(raw)
        unknown = None if trust_remote_code else _unknown_type(raw)
        config = (
            None
            if problems or unknown
            else AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        )
    except Exception as error:
        raise ArchitectureError(f"{path}: its config cannot be read: {_first_lines(error)}") from error
    if unknown:
        raise ArchitectureError(f"{path}: {unknown}")
    if problems:
        raise ArchitectureError(f"{path}: no model has such a config: {'; '.join(problems)}")
    mark_embedding_model(config, path, revision)
    return config


def _unknown_type(raw: Mapping[str, Any]) -> str | None:
    """Return an error message if transformers has no models of a config's type, otherwise None."""
    import transformers

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type in transformers.CONFIG_MAPPING:
        return None
    release = transformers.__version__
    text = f"model_type {model_type!r} is not supported: transformers {release} has no such models"
    if raw.get("auto_map"):
        return f"{text}, and this one brings its own code: set model.trust_remote_code to true to run that"
    suggestions = difflib.get_close_matches(model_type, list(transformers.CONFIG_MAPPING), n=1, cutoff=0.8)
    return text + (f" (did you mean {suggestions[0]}?)" if suggestions else "")


def read_architecture(config: Any, *, trust_remote_code: bool = False) -> Architecture:
    """Return the Linears of a config's model and the sizes of its other tensors, without allocating any.

    Raises:
        ArchitectureError: the architecture is not supported, or no model can be built from the config.
    """
    # accelerate lets models allocate a parameter before it moves it to the meta device; this does not.
    return describe(_build(config, torch.device("meta"), trust_remote_code=trust_remote_code), config)


def build_meta_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model on the meta device: shapes and module tree, no weights.

    Buffers that no checkpoint holds (rotary frequencies) have values.

    Raises:
        ArchitectureError: the architecture is not supported, or no model can be built from the config.
    """
    from accelerate import init_empty_weights

    with _LargeOnMeta():
        without_weights = init_empty_weights(include_buffers=False)
        return _build(config, without_weights, trust_remote_code=trust_remote_code)


class _LargeOnMeta(TorchFunctionMode):
    """Create tensors that are larger than any buffer on the meta device.

    `init_empty_weights` moves a parameter away after a module has made it, and the experts of one layer of
    Llama 4 would take 43 GB until then.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a factory on the meta device first, to see how large its tensor is."""
        del types
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if on_meta.numel() > _LARGEST_BUFFER:
                return on_meta
        return func(*args, **kwargs)


def _build(
    config: Any, without_weights: AbstractContextManager[Any], *, trust_remote_code: bool
) -> nn.Module:
    from transformers.initialization import no_init_weights

    check_supported(config)
    try:
        with without_weights, no_init_weights():  # there are no weights to draw
            model: nn.Module = auto_class(config).from_config(
                copy.deepcopy(config),  # from_config may drop the dtype of a nested config
                trust_remote_code=trust_remote_code,
                attn_implementation=attention_implementation(config),
            )
    except Exception as error:
        where = getattr(config, "name_or_path", "") or "this config"
        raise ArchitectureError(f"{where}: no model can be built from it: {_first_lines(error)}") from error
    tie_weights(model)
    return model.eval()


def own_dtype(config: Any) -> torch.dtype | None:
    """Return the precision of a model's weights; some vision-language configs give it for the text only."""
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def compressed_config(config: Any) -> CheckpointConfig | None:
    """Return the config's description of a compressed checkpoint; None for an ordinary model.

    Raises:
        ArchitectureError: the model is already quantized by another tool.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if as_dict.get("quant_method") != "ercsvd":
        raise ArchitectureError(
            f"the model is already quantized ({as_dict.get('quant_method')}); start from its original weights"
        )
    return CheckpointConfig.read(as_dict)


def tie_weights(model: nn.Module) -> None:
    """Make the output layer share the embedding's weight if the config ties them."""
    if getattr(model.config, "tie_word_embeddings", False):
        source = model.get_input_embeddings()  # type: ignore[operator]
        target = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(target, TiedOutputLayer):  # has no weight
            return
        if target is not None and isinstance(source.weight, torch.Tensor):
            target.weight = source.weight


def _first_lines(error: Exception) -> str:
    """Return the first two lines of an error's message: transformers gives the field, then the reason."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(lines) or type(error).__name__
