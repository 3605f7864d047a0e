"""Tensors of a layer's routed experts: which are described, which were loaded, and which are missing.

vLLM calls the projections of an expert w1 (gate), w3 (up) and w2 (down), whatever checkpoints call them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ercsvd_deploy.exporters.vllm.experts.fused_kinds import common_kind
from ercsvd_deploy.format.schema import GUARD, WEIGHT_SHAPE, Storage, WeightQuantization

Projection = tuple[int, str]  # index of the expert, vLLM's name of the projection


@dataclass
class ExpertTensors:
    """The tensors of the experts of one layer.

    Attributes:
        name: Name of the layer for error messages.
        described: Projection of an expert -> its name in the checkpoint and its storage; storage None means
            that of the original model.
    """

    name: str
    described: Mapping[Projection, tuple[str, Storage | None]]
    _loaded: dict[Projection, set[str]] = field(init=False, default_factory=dict)
    _pending: dict[Projection, dict[str, torch.Tensor]] = field(init=False, default_factory=dict)
    _refused: list[str] = field(init=False, default_factory=list)
    _on_other_ranks: set[int] = field(init=False, default_factory=set)

    @property
    def num_matrices(self) -> int:
        """Number of projections of all experts on this rank."""
        return sum(expert not in self._on_other_ranks for expert, _ in self.described)

    @property
    def common_quantization(self) -> WeightQuantization | None:
        """The common quantization of all projections; None if they differ."""
        return common_kind(storage for _, storage in self.described.values())

    def quantization(self, expert: int, projection: str) -> WeightQuantization | None:
        """Return a projection's quantization; None if it is plain or belongs to a fused shared expert."""
        _, storage = self.described.get((expert, projection), ("", None))
        return None if storage is None else storage.weight

    def keep_local(self, local_number: Callable[[int], int]) -> None:
        """Ignore the experts on other ranks.

        Args:
            local_number: Returns an expert's index on this rank, given its index; -1 if on another rank.
        """
        self._on_other_ranks = {expert for expert, _ in self.described if local_number(expert) == -1}

    def is_here(self, expert: int) -> bool:
        """Whether an expert is on this rank."""
        return expert not in self._on_other_ranks

    def take(
        self, expert: int, projection: str, leaf: str, tensor: torch.Tensor, *, keep: bool = True
    ) -> bool:
        """Record a loaded tensor; return whether it is as described.

        Args:
            expert: Index of the expert.
            projection: vLLM's name of the projection.
            leaf: Name of the tensor within the projection.
            tensor: The tensor.
            keep: Whether to keep the tensor for `pop_if_complete`, if it is quantized.
        """
        key = (expert, projection)
        name, storage = self.described.get(key, ("", None))
        if storage is None:
            if leaf == GUARD and tensor.numel():
                self._loaded.setdefault(key, set()).add(leaf)
                return True
            self._refused.append(f"surplus: {name}.{leaf} {list(tensor.shape)}, not described in config.json")
            return False
        expected = storage.tensor_shapes.get(leaf)
        if expected is None:
            self._refused.append(f"surplus: {name}.{leaf} {list(tensor.shape)}")
            return False
        self._loaded.setdefault(key, set()).add(leaf)
        if tuple(tensor.shape) != expected:
            self._refused.append(
                f"mis-shaped: {name}.{leaf} is {list(tensor.shape)}, config.json describes {list(expected)}"
            )
            return False
        if leaf == WEIGHT_SHAPE and tuple(tensor.tolist()) != storage.shape:
            self._refused.append(
                f"mis-shaped: {name}.{leaf} says {tensor.tolist()}, config.json describes "
                f"{list(storage.shape)}"
            )
            return False
        if keep and leaf != GUARD:
            self._pending.setdefault(key, {})[leaf] = tensor
        return True

    def pop_if_complete(self, expert: int, projection: str) -> Mapping[str, torch.Tensor] | None:
        """Return and release the tensors of a quantized projection if all are loaded; otherwise None."""
        key = (expert, projection)
        _, storage = self.described[key]
        assert storage is not None
        if self._pending.get(key, {}).keys() != storage.tensor_shapes.keys() - {GUARD}:
            return None
        return self._pending.pop(key)

    def problems(self) -> list[str]:
        """Return a line for each tensor that was missing, surplus or mis-shaped."""
        missing = []
        for (expert, projection), (name, storage) in self.described.items():
            if expert in self._on_other_ranks:
                continue
            shapes = {GUARD: ()} if storage is None else storage.tensor_shapes
            loaded = self._loaded.get((expert, projection), set())
            missing += [
                f"missing: {name}.{leaf}" + (f" {list(shape)}" if shape else "")
                for leaf, shape in shapes.items()
                if leaf not in loaded and all(shape)  # nothing is lost with a missing guard
            ]
        return missing + self._refused
