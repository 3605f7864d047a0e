"""vLLM methods that create, load and apply the linear layers of a compressed model.

One instance serves one layer: fused QKV, fused gate and up, column-parallel, row-parallel or replicated.
`LowRankLinearMethod` is for layers with at least one altered projection; each projection has its own layout
(see `format.schema`): dense, low-rank, pivoted or corrected, plain or integer, in any combination.
`UnalteredLinearMethod` is for all other layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.exporters.vllm.compatibility import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    envs,
    register_weight_loader_v2_supported_method,
)
from ercsvd_deploy.exporters.vllm.layers.layer import StackedLinear
from ercsvd_deploy.exporters.vllm.layers.layer_plan import (
    Projection,
    block_of_rank,
    blocks_of_fused,
    match_projections,
)
from ercsvd_deploy.exporters.vllm.layers.loading import (
    ProjectionLoader,
    ShardId,
    add_gates,
    shard_index,
)
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE, CheckpointFormatError, Storage

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord

_STACKED = "ercsvd"  # the child module of the layer that holds its matrices


class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """Creates, loads and applies the weights of one vLLM linear layer.

    Args:
        projections: checkpoint name and storage (None: that of the original model) of each of the layer's
            projections, in output order.
        record: the record of the model's kernels.
        check_model: called before the first weight is processed, when all tensors have been loaded; raises if
            any layer of the model lacks one.
        tell_ready: called when the layer's matrices are in their kernels' layouts.
    """

    def __init__(
        self,
        projections: Sequence[tuple[str, Storage | None]],
        record: KernelRecord,
        *,
        check_model: Callable[[], None],
        tell_ready: Callable[[], None],
    ) -> None:
        super().__init__()
        self._described = list(projections)
        self._record = record
        self._check_model = check_model
        self._tell_ready = tell_ready
        self._runs: tuple[slice, ...] = ()  # vLLM's projections in each of ours
        self._loaders: list[ProjectionLoader] = []
        self._stacked: StackedLinear | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Allocate this rank's matrices as a child of `layer` and gates for the checkpoint's tensors.

        Raises:
            CheckpointFormatError: config.json describes other projections or shapes than the model has.
            ValueError: this rank's columns cut a group of an integer matrix, or kernels are required and vLLM
                has none for one.
        """
        full_sizes, local_sizes = _full_output_sizes(layer, output_size), output_partition_sizes
        names = [name for name, _ in self._described]
        num_rows = [None if storage is None else storage.shape[0] for _, storage in self._described]
        runs = match_projections(full_sizes, num_rows)
        if runs is None or len(full_sizes) != len(local_sizes):
            raise CheckpointFormatError(
                f"{', '.join(names)}: vLLM computes {len(full_sizes)} projections here, the checkpoint "
                f"describes {len(names)}; all of them have to be stored apart, or as one matrix"
            )
        self._runs = runs
        columns = block_of_rank(input_size, input_size_per_partition, layer.tp_rank, layer.tp_size)
        projections = []
        for (name, described), run in zip(self._described, runs, strict=True):
            full_size, local_size = sum(full_sizes[run]), sum(local_sizes[run])
            description = described or Storage(layout="dense", shape=(full_size, input_size))
            if description.shape != (full_size, input_size):
                raise CheckpointFormatError(
                    f"{name}: config.json describes shape {list(description.shape)}, "
                    f"the model has {[full_size, input_size]}"
                )
            rows_on_rank = slice(0, local_size)
            gathered: tuple[slice, ...] = ()
            if len(full_sizes[run]) == 1:
                rows_on_rank = block_of_rank(full_size, local_size, layer.tp_rank, layer.tp_size)
            elif local_size != full_size:
                gathered = blocks_of_fused(full_sizes[run], local_sizes[run], layer.tp_rank, layer.tp_size)
            projection = Projection(name, description, rows_on_rank, columns, gathered)
            projection.check_pivots()
            projections.append(projection)
        # one matrix in the checkpoint (Phi-3, Falcon)
        is_fused = len(names) == 1 and len(full_sizes) > 1
        stacked = StackedLinear(
            projections, params_dtype, self._record, allow_op=not envs.VLLM_BATCH_INVARIANT
        )
        layer.register_module(_STACKED, stacked)
        self._stacked, self._loaders = stacked, stacked.loaders
        add_gates(layer, params_dtype, self._load, outputs_may_move=is_fused)

    def problems(self) -> list[str]:
        """Return a line for each tensor of the layer that was missing, surplus or mis-shaped."""
        # vLLM builds layers that it will not run on the meta device, and does not load them: tower and
        # projector of a vision-language model that is started with an image limit of zero
        if self._stacked is not None and all(tensor.is_meta for tensor in self._stacked.parameters()):
            return []
        return [problem for loader in self._loaders for problem in loader.problems()]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the whole model once, then convert this layer's matrices into their kernels' layouts."""
        self._check_model()
        getattr(layer, _STACKED).finalize()
        self._stacked, self._loaders = None, []
        self._tell_ready()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output on this rank, [..., sum of local outputs]."""
        output: torch.Tensor = getattr(layer, _STACKED)(x, bias)
        return output

    def _load(self, leaf: str, tensor: torch.Tensor, shard_id: ShardId) -> None:
        names = [name for name, _ in self._described]
        index = shard_index(shard_id, names, self._runs)
        if not self._loaders:
            raise RuntimeError(
                f"{names[index]}.{leaf}: weights of an ercsvd model that is being served cannot be replaced; "
                "restart vLLM"
            )
        self._loaders[index].load(leaf, tensor)


@register_weight_loader_v2_supported_method  # as vLLM registers the base class, by name
class UnalteredLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """vLLM's own method with a check for tensors of a compressed Linear that config.json does not describe.

    Without it they would raise an error deep inside vLLM that names one tensor at most.

    Args:
        names: checkpoint prefixes of the layer's projections, in output order.
        check_model: see `LowRankLinearMethod`.
    """

    def __init__(self, names: Sequence[str], check_model: Callable[[], None]) -> None:
        super().__init__()
        self._names = list(names)
        self._check_model = check_model
        self._num_projections = len(names)  # number of vLLM's projections, which may be more
        self._surplus: list[str] = []

    def create_weights(
        self, layer: Any, *sizes: Any, weight_loader: Callable[..., None], **options: Any
    ) -> None:
        """Create vLLM's weight, and gates for surplus tensors."""

        def load_unless_guard(param: torch.Tensor, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            if tuple(tensor.shape) == GUARD_SHAPE:
                self._record_surplus(GUARD, tensor, shard_id)
            elif shard_id is None:  # not every stock loader takes one
                weight_loader(param, tensor)
            else:
                weight_loader(param, tensor, shard_id)

        self._num_projections = len(getattr(layer, "output_sizes", self._names))
        super().create_weights(layer, *sizes, weight_loader=load_unless_guard, **options)
        add_gates(layer, layer.params_dtype, self._record_surplus)

    def problems(self) -> list[str]:
        """Return a line for each surplus tensor, which config.json does not describe."""
        return self._surplus

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the whole model once, then process the weight with vLLM's method."""
        self._check_model()
        super().process_weights_after_loading(layer)

    def _record_surplus(self, leaf: str, tensor: torch.Tensor, shard_id: ShardId) -> None:
        is_whole = shard_id is None or len(self._names) != self._num_projections
        name = ", ".join(self._names) if is_whole else self._names[shard_index(shard_id, self._names)]
        self._surplus.append(f"surplus: {name}.{leaf} {list(tensor.shape)}, not described in config.json")


def _full_output_sizes(layer: Any, output_size: int) -> list[int]:
    """Return the projections' numbers of outputs in the checkpoint."""
    # QKV's own `output_sizes` count a head that is repeated on several ranks several times
    if isinstance(layer, QKVParallelLinear):
        value_size = getattr(layer, "v_head_size", layer.head_size)
        return [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * value_size,
        ]
    return list(getattr(layer, "output_sizes", [output_size]))
