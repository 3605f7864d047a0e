"""Put the modules of compressed Linears into a model, found by the names of a checkpoint's description."""

from __future__ import annotations

import difflib

from torch import nn

from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError
from ercsvd_deploy.models.modules import build_linear

# Path parts in which loaders differ: `language_model.model.layers` on disk is `model.language_model.layers`
# in transformers 5, `model.layers` is `layers` in a model without a head, and CLIP's `vision_model` is gone.
_MOVABLE_PARTS = frozenset({"model", "language_model", "vision_model"})
_RENAMED_PARTS = {"block_sparse_moe": "mlp"}  # of Mixtral's checkpoints, in transformers


def canonical_name(name: str) -> str:
    """Return a module or tensor name without the path parts in which loaders and checkpoints differ."""
    parts = (part for part in name.split(".") if part not in _MOVABLE_PARTS)
    return ".".join(_RENAMED_PARTS.get(part, part) for part in parts)


def replace_linears(model: nn.Module, config: CheckpointConfig) -> dict[str, nn.Module]:
    """Replace every altered Linear by an uninitialised module of the same device and dtype.

    Nothing is replaced unless everything can be.

    Args:
        model: the original architecture.
        config: names every altered Linear, by its checkpoint name.

    Returns:
        Checkpoint name -> the module now in its place.

    Raises:
        CheckpointFormatError: names that match no Linear of the model, or other shapes; all are listed.
    """
    linears: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears.setdefault(canonical_name(name), []).append(name)
    problems = []
    targets: dict[str, tuple[str, nn.Linear]] = {}
    for checkpoint_name, storage in config.modules.items():
        candidates = linears.get(canonical_name(checkpoint_name), [])
        # An exact name settles what would otherwise be ambiguous.
        names = [checkpoint_name] if checkpoint_name in candidates else candidates
        if len(names) != 1:
            if names:
                problem = f"matches each of {', '.join(names)}"
            else:
                problem = f"is no Linear of the model{_did_you_mean(checkpoint_name, linears)}"
            problems.append(f"{checkpoint_name} {problem}")
            continue
        linear = model.get_submodule(names[0])
        assert isinstance(linear, nn.Linear)
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
    replaced: dict[str, nn.Module] = {}
    for checkpoint_name, (name, linear) in targets.items():
        replaced[checkpoint_name] = build_linear(
            config.modules[checkpoint_name],
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        model.set_submodule(name, replaced[checkpoint_name])
    return replaced


def _did_you_mean(name: str, linears: dict[str, list[str]]) -> str:
    near = difflib.get_close_matches(canonical_name(name), linears, n=3)
    suggestions = [actual for canonical in near for actual in linears[canonical]]
    return f" (did you mean {' or '.join(suggestions)}?)" if suggestions else ""
