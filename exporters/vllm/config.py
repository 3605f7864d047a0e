"""The quantization config that vLLM uses: methods for compressed layers, and the check of loaded tensors.

A layer is looked up in config.json by its *canonical* name, its path without the parts that name the whole
decoder (`model`, `language_model`, `transformer` ...): these differ between vLLM and checkpoints, vLLM's
mapping has changed from release to release, and the path of a draft model begins with `draft_model`. Fused
layers are looked up projection by projection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.exporters.vllm.compatibility import (
    QuantizationConfig,
    get_current_vllm_config_or_none,
    get_pp_group,
    get_tensor_model_parallel_rank,
    init_logger,
)
from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord
from ercsvd_deploy.exporters.vllm.layers.projection_names import projection_names
from ercsvd_deploy.format.schema import (
    QUANT_METHOD,
    CheckpointConfig,
    CheckpointFormatError,
    Storage,
)

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.experts.methods import PackedExpertsMethod, PlainExpertsMethod
    from ercsvd_deploy.exporters.vllm.layers.method import LowRankLinearMethod, UnalteredLinearMethod
    from ercsvd_deploy.exporters.vllm.layers.vocabulary import VocabularyMethod

    _ExpertsMethod = PackedExpertsMethod | PlainExpertsMethod
    _Method = LowRankLinearMethod | UnalteredLinearMethod | VocabularyMethod | _ExpertsMethod

_WRAPPER_PARTS = frozenset({"model", "language_model", "transformer", "gpt_neox", "draft_model"})
_RENAMED_PARTS = {"attn": "self_attn"}  # vLLM's name in gpt-oss -> the checkpoint's name
_LAYER_PATH = re.compile(r"^.*?\b(?:layers|h)\.\d+\b")
_OUTPUT_LAYERS = frozenset({"lm_head", "embed_out"})  # in checkpoints
_MAX_PROBLEMS = 40
# vLLM 0.32's PyTorch operators use -1, which means no adapter, as an index
_ADAPTERS_ON_CPUS = (
    "vLLM's CPU engine applies the LoRA adapter in its last slot to requests without one that run beside "
    "requests with one, whatever the model: start it with --max-loras one larger than the number of "
    "adapters, so that this slot stays empty"
)
_LOGGER = "vllm.ercsvd"  # a child of vLLM's logger, for its level and format


class ErcSvdConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """vLLM's quantization config of a compressed checkpoint.

    Raises:
        CheckpointFormatError: two modules of the description would be the same layer of the served model.
    """

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self._modules: dict[str, tuple[str, Storage]] = {}
        for name, storage in checkpoint.modules.items():
            if not storage.is_altered:
                continue
            first_name, _ = self._modules.setdefault(canonical_name(name), (name, storage))
            if first_name != name:
                raise CheckpointFormatError(
                    f"quantization_config.modules: {first_name} and {name} are one layer to vLLM"
                )
        self._unchecked: list[_Method] = []
        self._has_experts = any(".experts." in name for name in self._modules)
        self._matched: set[str] = set()
        self._layers_here: set[str] = set()
        self._reads_checkpoint = True
        self._kernels = KernelRecord(is_required=checkpoint.require_kernels)
        self._num_unready = 0
        self._serves_adapters = False

    @classmethod
    def get_name(cls) -> str:
        """Return the method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the supported activation dtypes; with float32, integer matrices are dequantized."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest CUDA capability; the integer kernels state their own."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: everything is in config.json, which enters vLLM's compilation hash."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ErcSvdConfig:
        """Read the `quantization_config` of config.json.

        Raises:
            CheckpointFormatError: this version cannot read it.
        """
        return cls(CheckpointConfig.read(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return a layer's method: for a Linear ours if a projection is altered, else vLLM's with checks.

        Routed experts get our method if one of them is altered, an input embedding and an output layer if
        they are integers. Attention gets None, which means "not quantized" in vLLM.
        """
        # Imported here: they load vLLM's kernels, which processes that only read the config do not need.
        from ercsvd_deploy.exporters.vllm.compatibility import LinearBase, VocabParallelEmbedding
        from ercsvd_deploy.exporters.vllm.layers.method import LowRankLinearMethod, UnalteredLinearMethod

        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return self._experts_method(layer, prefix) if self._has_experts else None
        self._record_layer(prefix)
        names = self._projection_names(prefix)
        described = [self._modules.get(canonical_name(name)) for name in names]
        self._matched.update(entry[0] for entry in described if entry)
        method: LowRankLinearMethod | UnalteredLinearMethod
        if any(described):
            projections = [entry or (name, None) for name, entry in zip(names, described, strict=True)]
            method = LowRankLinearMethod(
                projections, self._kernels, check_model=self.check_loaded, tell_ready=self._layer_is_ready
            )
            self._num_unready += 1
        else:
            method = UnalteredLinearMethod(names, self.check_loaded)
        self._unchecked.append(method)
        return method

    def _record_layer(self, prefix: str) -> None:
        """Record that a decoder layer is on this rank, and how the engine loads weights."""
        layer_path = _LAYER_PATH.match(canonical_name(prefix))
        if layer_path:
            self._layers_here.add(layer_path[0])
        engine = get_current_vllm_config_or_none()
        # `dummy` loads no tensors at all; vLLM's benchmarks use it
        self._reads_checkpoint = engine is None or str(engine.load_config.load_format) != "dummy"
        self._serves_adapters = engine is not None and engine.lora_config is not None

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        """Return a method for routed experts; None for other layers, or if no expert is altered."""
        from ercsvd_deploy.exporters.vllm.compatibility import RoutedExperts

        if not isinstance(layer, RoutedExperts):
            return None
        from ercsvd_deploy.exporters.vllm.experts.choice import choose_experts_method
        from ercsvd_deploy.exporters.vllm.experts.tensors import ExpertTensors

        self._record_layer(prefix)
        leaves = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        described = {}
        for number in range(layer.moe_config.num_logical_experts):
            for projection, leaf in leaves.items():
                name = f"{prefix}.{number}.{leaf}"
                described[number, projection] = self._modules.get(canonical_name(name), (name, None))
        self._matched.update(name for name, storage in described.values() if storage is not None)
        if all(storage is None for _, storage in described.values()):
            return None
        method = choose_experts_method(
            layer,
            ExpertTensors(prefix, described),
            self._kernels,
            check_model=self.check_loaded,
            tell_ready=self._layer_is_ready,
        )
        self._num_unready += 1
        self._unchecked.append(method)
        return method

    def _vocabulary_method(self, layer: Any, prefix: str) -> Any:
        """Return a method for an input embedding or an output layer; None for vLLM's own method."""
        from ercsvd_deploy.exporters.vllm.compatibility import ParallelLMHead
        from ercsvd_deploy.exporters.vllm.layers.vocabulary import (
            EmbeddingMethod,
            OutputLayerMethod,
            TiableOutputLayerMethod,
        )

        is_output = isinstance(layer, ParallelLMHead)
        entry = self._find_vocabulary(layer, prefix, is_output=is_output)
        if entry is None:
            return TiableOutputLayerMethod() if is_output else None
        self._matched.add(entry[0])
        method = (OutputLayerMethod if is_output else EmbeddingMethod)(
            *entry, self._kernels, check_model=self.check_loaded, tell_ready=self._layer_is_ready
        )
        self._num_unready += 1
        self._unchecked.append(method)
        return method

    def _find_vocabulary(self, layer: Any, prefix: str, *, is_output: bool) -> tuple[str, Storage] | None:
        """Return checkpoint name and storage of an embedding or output layer; None if it is not altered.

        In many of vLLM's models the embedding has no name, and in some the output layer's name differs from
        the checkpoint's: then it is the only entry of its kind and shape outside the decoder layers.
        """
        if entry := self._modules.get(canonical_name(prefix)):
            return entry
        shape = (layer.org_vocab_size, layer.embedding_dim)
        candidates = [
            entry
            for canonical, entry in self._modules.items()
            if not _LAYER_PATH.match(canonical)
            and entry[1].shape == shape
            and (canonical.rpartition(".")[2] in _OUTPUT_LAYERS) is is_output
        ]
        return candidates[0] if len(candidates) == 1 else None

    def check_loaded(self) -> None:
        """Raise one error that names every tensor that was not loaded as config.json describes it.

        The layers' methods call it when vLLM has loaded all weights; only the first call has an effect.

        Raises:
            CheckpointFormatError: tensors were missing, surplus or mis-shaped, or config.json describes
                modules that the model does not have.
        """
        if not self._unchecked:
            return
        problems = [
            f"unknown: {name} is described in config.json, but the model has no such layer"
            for canonical, (name, _) in self._modules.items()
            if name not in self._matched and not self._may_be_elsewhere(canonical)
        ]
        if self._reads_checkpoint:
            problems += [problem for method in self._unchecked for problem in method.problems()]
        self._unchecked = []
        if problems:
            hidden = len(problems) - _MAX_PROBLEMS
            more = [f"... and {hidden} more"] if hidden > 0 else []
            raise CheckpointFormatError(
                f"the checkpoint does not hold what its config.json describes ({len(problems)} problems):\n  "
                + "\n  ".join(problems[:_MAX_PROBLEMS] + more)
                + "\nThe directory is incomplete or was edited: export or copy it again."
            )

    def _layer_is_ready(self) -> None:
        """Count the finished layers; after the last one, log warnings about missing kernels and adapters."""
        from ercsvd_deploy.exporters.vllm.compatibility import current_platform

        self._num_unready -= 1
        if self._num_unready or get_tensor_model_parallel_rank() != 0:
            return
        if summary := self._kernels.summary():
            init_logger(_LOGGER).warning(summary)
        if self._serves_adapters and current_platform.is_cpu():
            init_logger(_LOGGER).warning(_ADAPTERS_ON_CPUS)

    def _projection_names(self, prefix: str) -> list[str]:
        if canonical_name(prefix) in self._modules:
            return [prefix]
        return projection_names(prefix, self.packed_modules_mapping.get(prefix.rpartition(".")[2]))

    def _may_be_elsewhere(self, canonical: str) -> bool:
        """Whether a module may be on another pipeline-parallel rank."""
        layer_path = _LAYER_PATH.match(canonical)
        is_absent = layer_path is None or layer_path[0] not in self._layers_here
        return get_pp_group().world_size > 1 and is_absent


def canonical_name(name: str) -> str:
    """Return a module path without the parts in which vLLM and checkpoints differ."""
    parts = (part for part in name.split(".") if part not in _WRAPPER_PARTS)
    return ".".join(_RENAMED_PARTS.get(part, part) for part in parts)
