"""Give the modules of a meta model their tensors from a store, and check first that they fit."""

from __future__ import annotations

import torch
from torch import nn

from ercsvd_deploy.format.tensor_store import CheckpointError, TensorStore

_FLOATS = ("F32", "F16", "BF16")


def check_store(model: nn.Module, store: TensorStore) -> frozenset[str]:
    """Compare names, shapes and dtypes of a model's tensors with a store's before anything is loaded.

    Returns:
        The names of the model's tensors; a tied output layer, which a store need not have, is left out.

    Raises:
        CheckpointError: the store lacks tensors, or has them in another shape or as integers.
    """
    stored = store.names()
    output = model.get_output_embeddings()  # type: ignore[operator]
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    tied = {f"{name}.weight" for name, module in model.named_modules() if is_tied and module is output}
    problems = []
    for name, tensor in model.state_dict().items():
        if name not in stored:
            if name not in tied:
                problems.append(f"{name} is missing")
            continue
        info = store.info(name)
        if info.shape != tuple(tensor.shape):
            problems.append(f"{name} has shape {list(info.shape)}, the config asks for {list(tensor.shape)}")
        elif tensor.is_floating_point() and info.dtype not in _FLOATS:
            problems.append(f"{name} is stored as {info.dtype}; only {', '.join(_FLOATS)} will do")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise CheckpointError(f"weights and config.json disagree: {listed}")
    return frozenset(model.state_dict()) - tied


def load_tensors(
    module: nn.Module,
    prefix: str,
    store: TensorStore,
    device: torch.device,
    dtype: torch.dtype,
    *,
    recurse: bool = True,
) -> None:
    """Load a module's tensors from a store.

    Args:
        module: Of a meta model; its buffers that no checkpoint holds are moved to the device.
        prefix: In front of its tensors' names, up to the last dot.
        store: Holds them.
        device: Where they are put.
        dtype: Precision of floating-point tensors.
        recurse: Whether submodules are loaded too.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    names = list(module.state_dict() if recurse else _own_state(module))
    stored = store.read(prefix + name for name in names)
    tensors = {}
    for name in names:
        tensor = stored.pop(prefix + name)
        if tensor.is_floating_point():
            tensor = tensor.to(device, dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{prefix}{name} holds NaN or infinite values")
        tensors[name] = tensor.to(device)
    if recurse:
        module.load_state_dict(tensors, assign=True)
    else:
        for name, tensor in tensors.items():
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[name] = tensor
    for parameter in module.parameters(recurse=recurse):
        parameter.requires_grad_(False)
    for name, buffer in module.named_buffers(recurse=recurse):
        if name not in tensors:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of `module` itself that a checkpoint holds."""
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    buffers = {
        name: value
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    return parameters | buffers
