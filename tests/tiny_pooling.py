"""Random tiny models that embed or score texts, with files as their authors publish them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.tiny_models import make_tokenizer, randomise

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SENTENCE_TRANSFORMERS = "sentence_transformers.models"
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{_SENTENCE_TRANSFORMERS}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_SENTENCE_TRANSFORMERS}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{_SENTENCE_TRANSFORMERS}.Normalize"},
]
POOLING_FILES: Mapping[str, Any] = {
    "modules.json": _MODULES,
    "1_Pooling/config.json": {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True},
    "config_sentence_transformers.json": {"prompts": {"query": "Query: "}, "similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": 256},
}
_CLASSIFIER = {"num_labels": 3, "problem_type": "single_label_classification"}
# Name -> model type, class, what the config has beside `_SIZES`, name that config.json has for the class.
KINDS: Mapping[str, tuple[str, Any, Mapping[str, Any], str | None]] = {
    "bare": ("mistral", AutoModel, {"sliding_window": 16}, None),  # as e5-mistral is
    "sentence-transformers": ("qwen3", AutoModel, {}, "Qwen3ForCausalLM"),  # as Qwen3-Embedding-8B is
    "bare-experts": (
        "qwen3_moe",
        AutoModel,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        None,
    ),
    "classifier": ("llama", AutoModelForSequenceClassification, _CLASSIFIER, None),
    "reranker": ("qwen3", AutoModelForSequenceClassification, {"num_labels": 1}, None),
}
PoolingModel = Callable[[str], Path]


def pooling_config(kind: str) -> PreTrainedConfig:
    """Return the config of one of `KINDS`."""
    model_type, _, differences, _ = KINDS[kind]
    return AutoConfig.for_model(model_type, **(_SIZES | {"tie_word_embeddings": False} | dict(differences)))


def save_tiny_pooling_model(directory: Path, kind: str) -> Path:
    """Write a random float32 model of one of `KINDS` with tokenizer and pooling files; return `directory`."""
    _, auto, _, named = KINDS[kind]
    model: PreTrainedModel = auto.from_config(pooling_config(kind), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if named is not None:
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | {"architectures": [named]}))
        for name, content in POOLING_FILES.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(json.dumps(content))
    return directory


@torch.no_grad()
def last_hidden_states(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers computes with a dense model, [rows, tokens, hidden], behind the final norm."""
    states: torch.Tensor = AutoModel.from_pretrained(directory, dtype=torch.float32)(tokens).last_hidden_state
    return states
