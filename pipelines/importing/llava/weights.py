"""The tensors of an original-format LLaVA checkpoint, under the names and in the shapes of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.format.files.store_views import CastingStore
from ercsvd_deploy.format.files.tensor_store import CheckpointError, TensorInfo, TensorStore, torch_dtype
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.llava_names import LANGUAGE_MODEL, VISION_TOWER, from_original
from ercsvd_deploy.pipelines.importing.llava.config import LlavaImportError

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.importing.llava.tower import VisionTower

EMBEDDING = f"{LANGUAGE_MODEL}embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
# Buffers that old versions of transformers stored and that are computed now.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_MOST_NAMED = 3


def open_weights(directory: Path) -> TensorStore:
    """Open an original checkpoint's weights under the checkpoint's names.

    Raises:
        LlavaImportError: they are pickles, or those of an adapter.
        CheckpointError: there are none, or they cannot be read.
    """
    if any(directory.glob("*.safetensors")):
        return open_directory(directory)
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise LlavaImportError(f"{directory}: a LoRA adapter; merge it into its base model first")
    pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.bin.index.json")])
    if pickled:
        raise LlavaImportError(
            f"{directory}: its weights are pickles ({pickled[0].name}), which are never read; convert them "
            "to safetensors. Of LLaVA v1.5, llava-hf/llava-1.5-7b-hf and llava-hf/llava-1.5-13b-hf are the "
            "same models in safetensors, and need no import"
        )
    return open_directory(directory)


class ImportedStore:
    """The tensors of checkpoint and tower together, with rows added to embedding and output layer.

    A new row is the mean of all old ones. No text contains its token, and as an output it is never the most
    probable, because the mean of logits is not their maximum.
    """

    def __init__(self, origins: Mapping[str, tuple[TensorStore, str]], num_rows: Mapping[str, int]) -> None:
        """Give access to tensors of several stores.

        Args:
            origins: Name -> its store, and its name there.
            num_rows: Name -> number of rows after rows are added, for the tensors that get some.
        """
        self._origins = dict(origins)
        self._num_rows = dict(num_rows)

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return frozenset(self._origins)

    def stored_name(self, name: str) -> str:
        """Return a tensor's name in the store that it comes from."""
        return self._origins[name][1]

    def stored_info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor before rows are added."""
        store, stored_name = self._origin(name)
        return store.info(stored_name)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        info = self.stored_info(name)
        if name not in self._num_rows:
            return info
        shape = (self._num_rows[name], *info.shape[1:])
        return TensorInfo(shape, info.dtype, math.prod(shape) * torch_dtype(info.dtype).itemsize)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, in the precision they are stored in.

        Raises:
            CheckpointError: a tensor is absent or unreadable, or holds NaN or infinite values.
        """
        by_store: dict[int, tuple[TensorStore, dict[str, str]]] = {}
        for name in names:
            store, stored_name = self._origin(name)
            by_store.setdefault(id(store), (store, {}))[1][stored_name] = name
        tensors = {
            names_by_stored[stored_name]: tensor
            for store, names_by_stored in by_store.values()
            for stored_name, tensor in store.read(names_by_stored).items()
        }
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{self.stored_name(name)} holds NaN or infinite values: the checkpoint is damaged"
                )
        return {
            name: _with_rows(tensor, self._num_rows[name]) if name in self._num_rows else tensor
            for name, tensor in tensors.items()
        }

    def _origin(self, name: str) -> tuple[TensorStore, str]:
        try:
            return self._origins[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name} in the checkpoint") from None


def gather(checkpoint: TensorStore, tower: VisionTower, vocab_size: int) -> ImportedStore:
    """Return all tensors of the model; `tower` is used only if the checkpoint has no tower.

    Args:
        checkpoint: The original checkpoint's tensors, under the checkpoint's names.
        tower: The vision tower; its float32 weights are converted to the language model's dtype, as LLaVA's
            code does.
        vocab_size: Rows of embedding and output layer after rows are added.

    Raises:
        LlavaImportError, CheckpointError, ArchitectureError: a needed part is missing or cannot be read.
    """
    origins: dict[str, tuple[TensorStore, str]] = {
        from_original(name): (checkpoint, name) for name in checkpoint.names() if not _is_computed(name)
    }
    if EMBEDDING not in origins:
        raise LlavaImportError("the checkpoint has no model.embed_tokens.weight: is it complete?")
    if not holds_tower(checkpoint):
        weights = tower.store()
        dtype = torch_dtype(checkpoint.info(origins[EMBEDDING][1]).dtype)
        if dtype != torch.float32 and _holds_float32(weights):
            weights = CastingStore(weights, dtype)
        origins |= {name: (weights, name) for name in weights.names() if not _is_computed(name)}
    return ImportedStore(origins, dict.fromkeys((EMBEDDING, OUTPUT_LAYER), vocab_size))


def holds_tower(checkpoint: TensorStore) -> bool:
    """Whether an original checkpoint contains a vision tower, as it does if the tower was trained too."""
    return any(from_original(name).startswith(VISION_TOWER) for name in checkpoint.names())


def check_against(model: nn.Module, store: ImportedStore, num_stored_rows: int) -> None:
    """Compare names and shapes with those of a model, which may be on the meta device.

    Args:
        model: The transformers model.
        store: The tensors.
        num_stored_rows: Rows that embedding and output layer have before any are added.

    Raises:
        LlavaImportError: a tensor is missing, surplus or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in (EMBEDDING, OUTPUT_LAYER):
        expected[name] = (num_stored_rows, *expected[name][1:])
    complaints = []
    if missing := sorted(set(expected) - store.names()):
        complaints.append(f"lacks what transformers calls {_enumerate(missing)}")
    if surplus := sorted(store.stored_name(name) for name in store.names() - set(expected)):
        complaints.append(f"has {_enumerate(surplus)}, for which the model has no place")
    stored_shapes = {name: store.stored_info(name).shape for name in sorted(set(expected) & store.names())}
    if wrong := [
        f"{store.stored_name(name)} {list(shape)} instead of {list(expected[name])}"
        for name, shape in stored_shapes.items()
        if shape != expected[name]
    ]:
        complaints.append(f"has {_enumerate(wrong)}")
    if complaints:
        raise LlavaImportError(f"config and weights do not fit: the checkpoint {'; it '.join(complaints)}")


def _holds_float32(store: TensorStore) -> bool:
    return any(torch_dtype(store.info(name).dtype) == torch.float32 for name in store.names())


def _is_computed(name: str) -> bool:
    return name.endswith(_COMPUTED)


def _with_rows(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return a matrix [rows, columns] filled up to `num_rows` rows with the mean of the existing ones."""
    mean = matrix.mean(dim=0, dtype=torch.float32).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(num_rows - len(matrix), -1)])


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
