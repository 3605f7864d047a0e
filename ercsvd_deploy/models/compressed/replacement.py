"""Put the modules of compressed Linears into a model, found by the names of a checkpoint's description.

An input embedding of integers is found and replaced in the same way, and so is an output layer tied to it.
"""

from __future__ import annotations

import difflib

import torch
from torch import nn

from ercsvd_deploy.format.schema import WEIGHT, CheckpointConfig, CheckpointFormatError, Storage
from ercsvd_deploy.models.compressed.modules import (
    CorrectedLinear,
    LowRankLinear,
    PackedLinear,
    PivotedLinear,
)
from ercsvd_deploy.models.compressed.packed_embedding import PackedEmbedding, TiedOutputLayer, pack_embedding

# Path parts in which loaders differ: `language_model.model.layers` on disk is `model.language_model.layers`
# in transformers 5, `model.layers` is `layers` in a model without a head, and CLIP's `vision_model` is gone.
_WITHIN_TOWER = "vision_model"
_MOVABLE_PARTS = frozenset({"model", "language_model", _WITHIN_TOWER})
# Parts of checkpoints' names, and what transformers calls them: of Mixtral, and of GPT-NeoX.
_RENAMED_PARTS = {"block_sparse_moe": "mlp", "embed_out": "lm_head"}


def canonical_name(name: str) -> str:
    """Return a module or tensor name without the path parts in which loaders and checkpoints differ."""
    parts: list[str] = []
    for part in name.split("."):
        # the whole tower of Llama 4, whose layers are called like the decoder's
        is_tower = part == _WITHIN_TOWER and not parts
        if part not in _MOVABLE_PARTS or is_tower:
            parts.append(_RENAMED_PARTS.get(part, part))
    return ".".join(parts)


def replace_linears(model: nn.Module, config: CheckpointConfig) -> dict[str, nn.Module]:
    """Replace every altered Linear or embedding by an uninitialised module of the same device and dtype.

    Either all are replaced or none.

    Args:
        model: a model of the original architecture.
        config: the description of the checkpoint: storage of every altered Linear and embedding.

    Returns:
        The new modules by their names in the checkpoint.

    Raises:
        CheckpointFormatError: names that match no Linear of the model, or other shapes; all are listed.
    """
    names_by_canonical: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            names_by_canonical.setdefault(canonical_name(name), []).append(name)
    problems = []
    targets: dict[str, tuple[str, nn.Linear | nn.Embedding]] = {}
    for checkpoint_name, storage in config.modules.items():
        candidates = names_by_canonical.get(canonical_name(checkpoint_name), [])
        # An exact match wins over several candidates.
        names = [checkpoint_name] if checkpoint_name in candidates else candidates
        if len(names) != 1:
            if names:
                problem = f"matches each of {', '.join(names)}"
            else:
                problem = f"is no Linear of the model{_did_you_mean(checkpoint_name, names_by_canonical)}"
            problems.append(f"{checkpoint_name} {problem}")
            continue
        linear = model.get_submodule(names[0])
        assert isinstance(linear, nn.Linear | nn.Embedding)
        if tuple(linear.weight.shape) != storage.shape:
            problems.append(
                f"{checkpoint_name} has shape {list(linear.weight.shape)} in the model, "
                f"{list(storage.shape)} in the checkpoint"
            )
        targets[checkpoint_name] = (names[0], linear)
    if problems:
        raise CheckpointFormatError(
            f"{len(problems)} of {len(config.modules)} modules in quantization_config do not fit "
            f"{type(model).__name__}; use the config.json that the checkpoint was exported with:\n  "
            + "\n  ".join(problems)
        )
    tied = _tied_output_layer(model, {name for name, _ in targets.values()})
    replaced: dict[str, nn.Module] = {}
    for checkpoint_name, (name, module) in targets.items():
        replaced[checkpoint_name] = _replace(model, name, module, config.modules[checkpoint_name])
    embedding = model.get_input_embeddings() if tied is not None else None  # type: ignore[operator]
    if tied is not None and isinstance(embedding, PackedEmbedding):
        name, output_layer = tied
        model.set_submodule(name, TiedOutputLayer(embedding, output_layer.bias))
    return replaced


def _replace(model: nn.Module, name: str, module: nn.Linear | nn.Embedding, storage: Storage) -> nn.Module:
    """Replace a module and return the new one; an embedding is changed in place."""
    if isinstance(module, nn.Embedding):
        pack_embedding(module, storage)
        return module
    replacement = build_linear(
        storage, bias=module.bias is not None, device=module.weight.device, dtype=module.weight.dtype
    )
    model.set_submodule(name, replacement)
    return replacement


def _tied_output_layer(model: nn.Module, described: set[str]) -> tuple[str, nn.Linear] | None:
    """Return the Linear that multiplies the embedding's matrix, and its name; None if there is none.

    Args:
        model: A model whose weights are tied already, or listed as to be tied while transformers loads it.
        described: Names of modules that the checkpoint describes: these have tensors of their own.
    """
    output_layer = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(output_layer, nn.Linear):
        return None
    [name] = [name for name, module in model.named_modules() if module is output_layer]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    is_one_tensor = output_layer.weight is getattr(embedding, WEIGHT, None)
    will_be = f"{name}.{WEIGHT}" in (getattr(model, "all_tied_weights_keys", None) or {})
    return (name, output_layer) if (is_one_tensor or will_be) and name not in described else None


def _did_you_mean(name: str, names_by_canonical: dict[str, list[str]]) -> str:
    close_matches = difflib.get_close_matches(canonical_name(name), names_by_canonical, n=3)
    suggestions = [actual for canonical in close_matches for actual in names_by_canonical[canonical]]
    return f" (did you mean {' or '.join(suggestions)}?)" if suggestions else ""


def build_linear(
    storage: Storage,
    *,
    bias: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> CorrectedLinear | LowRankLinear | PivotedLinear | PackedLinear | nn.Linear:
    """Return an uninitialised module whose state dict has the tensors of `storage`."""
    if storage.layout == "low_rank":
        return LowRankLinear(storage, bias=bias, device=device, dtype=dtype)
    if storage.layout == "pivoted":
        return PivotedLinear(storage, bias=bias, device=device, dtype=dtype)
    if storage.layout == "corrected":
        return CorrectedLinear(storage, bias=bias, device=device, dtype=dtype)
    out_features, in_features = storage.shape
    if storage.weight is None:
        return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    return PackedLinear(
        in_features, out_features, storage.weight, bias=bias, guard=True, device=device, dtype=dtype
    )
