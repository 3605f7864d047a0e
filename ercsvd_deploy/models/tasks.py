"""What a decoder is made for: to predict tokens, to embed a text as a vector, or to score it.

config.json names the class of the model. sentence-transformers runs language models without their output
layer, whatever class that is; a file beside the config says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Task = Literal["generate", "embed", "classify"]
# How the classes of models that predict tokens end, in transformers and in vLLM.
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SENTENCE_TRANSFORMERS_MODULES = "modules.json"
_POOLING = "Pooling"  # how the class of the module ends that makes one vector of those of all tokens


def find_task(model_type: object, architectures: object) -> Task | None:
    """Return what a model is made for, by what config.json says; None: nothing that is known here.

    Args:
        model_type: As config.json has it.
        architectures: Names of classes; a config that has none is that of a model that predicts tokens.
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
    """Return what the model of a config is made for."""
    return find_task(config.model_type, getattr(config, "architectures", None)) or "generate"


def auto_class(config: Any) -> Any:
    """Return the class of transformers that builds and loads the model of a config."""
    import transformers

    from ercsvd_deploy.models.vision import reads_images

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
    """Let a config name the class that sentence-transformers runs, if its files lie beside it.

    Args:
        config: Of the model.
        path: Hub id or directory.
        revision: Branch, tag or commit on the hub.
    """
    if _is_text_decoder(str(config.model_type)) and _is_pooled(path, revision):
        from transformers.models.auto import modeling_auto

        config.architectures = [modeling_auto.MODEL_MAPPING_NAMES[config.model_type]]


def _is_text_decoder(model_type: str) -> bool:
    """Whether transformers has causal language models of a type, and no vision-language models."""
    from transformers.models.auto import modeling_auto

    sees = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not sees


def _is_pooled(path: str, revision: str | None) -> bool:
    """Whether the files beside a model say that its tokens' vectors are pooled."""
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
