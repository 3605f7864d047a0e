"""Load tensors from a store into the modules of a model on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from ercsvd_deploy.format.files.tensor_store import CheckpointError, TensorStore

# A router's correction of its scores: rounded to 16 bits it would send tokens to other experts.
_ALWAYS_FLOAT32 = "e_score_correction_bias"


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
        module: Module of a meta model; its buffers that no checkpoint holds are moved to the device.
        prefix: Prefix of its tensors' names in the store, with the last dot.
        store: The store to read from.
        device: Device of the loaded tensors.
        dtype: Precision of floating-point tensors; those that transformers keeps in float32 stay so.
        recurse: Whether to load submodules too.

    Raises:
        CheckpointError: a tensor has NaN or infinite values.
    """
    names = list(module.state_dict() if recurse else own_state(module))
    stored = store.read(prefix + name for name in names)
    tensors = {}
    for name in names:
        tensor = stored.pop(prefix + name)
        if tensor.is_floating_point():
            tensor = tensor.to(device, torch.float32 if name.endswith(_ALWAYS_FLOAT32) else dtype)
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


def own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of `module` itself, without those of its submodules."""
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    buffers = {
        name: value
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    return parameters | buffers
