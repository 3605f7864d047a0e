"""The dense model that a compressed checkpoint of any family stands for, stored as its family stores it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ercsvd_deploy.models.experts.stacked import stack_experts
from tests.models.streamed import streamed
from tests.tiny_models import WEIGHTS_FILE
from tests.tiny_models import materialise as write_dense


def materialise(compressed: Path, target: Path) -> Path:
    """Write the dense model, integers dequantized, with experts as transformers alone reads them."""
    write_dense(compressed, target)
    model = streamed(target)
    store = stack_experts(model.store, model.architecture)
    if store is not model.store:
        tensors = store.read(store.names())
        named = {model.architecture.checkpoint_name(name): tensor for name, tensor in tensors.items()}
        save_file(named, target / WEIGHTS_FILE, metadata={"format": "pt"})
    return target
