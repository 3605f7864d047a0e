"""The task of a decoder: to generate text, to embed texts as vectors, or to classify them.

The class that config.json names decides. sentence-transformers runs language models without their output
layer, whatever their class is; its file next to config.json is the sign of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Task = Literal["generate", "embed", "classify"]
# Ends of class names of models that generate text, in transformers and in vLLM.
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SENTENCE_TRANSFORMERS_MODULES = "modules.json"
_POOLING = "Pooling"  # end of the class name of the module that pools the tokens' vectors


def find_task(model_type: object, architectures: object) -> Task | None:
    """Return the task of a model by the contents of config.json; None if it is not supported.

    Args:
        model_type: The field of config.json.
        architectures: The field of config.json: class names; without any the model generates text.
    """
    if not isinstance(architectures, list) or not architectures:
        return "generate"
    names = {name for name in architectures if isinstance(name, str)}
    if any(name.endswith(_GENERATING) for name in names):
        return "generate"
    if not isinstance(model_type, str) or not _is_text_decoder(model_type):
        return None
    from transformers.models.auto import modeling_auto

    if modeling_auto.MODEL_MAPPING_NAMES.get(model_type) in names:
        return "embed"
    if modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type) in names:
        return "classify"
    return None


def task_of(config: Any) -> Task:
    """Return the task of a config's model."""
    return find_task(config.model_type, getattr(config, "architectures", None)) or "generate"


def auto_class(config: Any) -> Any:
    """Return the class of transformers that builds and loads a config's model."""
    import transformers

    from ercsvd_deploy.models.description.vision import reads_images

    task = task_of(config)
    if task == "embed":
        return transformers.AutoModel
    if task == "classify":
        return transformers.AutoModelForSequenceClassification
    return (
        transformers.AutoModelForImageTextToText
        if reads_images(config)
        else transformers.AutoModelForCausalLM
    )


def mark_embedding_model(config: Any, path: str, revision: str | None) -> None:
    """Set the config's class to that of an embedding model if sentence-transformers' files are next to it.

    Args:
        config: The model's config, changed in place.
        path: Hub id or directory of the model.
        revision: Branch, tag or commit on the hub.
    """
    if _is_text_decoder(str(config.model_type)) and _is_pooled(path, revision):
        from transformers.models.auto import modeling_auto

        config.architectures = [modeling_auto.MODEL_MAPPING_NAMES[config.model_type]]


def _is_text_decoder(model_type: str) -> bool:
    """Whether transformers has causal language models of a type, but no vision-language models."""
    from transformers.models.auto import modeling_auto

    reads_images = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not reads_images


def _is_pooled(path: str, revision: str | None) -> bool:
    """Whether sentence-transformers' files next to a model have a module that pools the tokens' vectors."""
    from transformers.utils import cached_file

    file: str | None = cached_file(
        path,
        _SENTENCE_TRANSFORMERS_MODULES,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        modules = json.loads(Path(file).read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, RecursionError):
        return False
    kinds = [module.get("type") for module in modules or () if isinstance(module, dict)]
    return any(isinstance(kind, str) and kind.endswith(_POOLING) for kind in kinds)
