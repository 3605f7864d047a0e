"""Load and save compressed checkpoints with transformers: `import ercsvd_deploy.hf`, then `from_pretrained`.

Importing this module registers quant_method "ercsvd" with transformers' own quantizer registry, nothing else.
Without it, transformers warns that the quantization type is unknown, looks for the original weights, finds
the empty guards instead (see `format.schema`) and stops on a size mismatch. Its argument
`ignore_mismatched_sizes=True` switches that protection off: every compressed Linear is then filled with
random numbers, and a warning says so. Never pass it where this module was not imported.

For a model with a quantizer, transformers itself neither stops on missing tensors nor looks at shapes at all;
the checks here do both, whatever `ignore_mismatched_sizes` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ercsvd_deploy.format.files.tensor_store import TensorInfo, read_header
from ercsvd_deploy.format.schema import (
    FACTOR_PARTS,
    QUANT_METHOD,
    ROW_ORDER,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    CheckpointConfig,
    CheckpointFormatError,
)
from ercsvd_deploy.models.compressed.modules import PackedLinear, PivotedLinear
from ercsvd_deploy.models.compressed.packed_embedding import PackedEmbedding, TiedOutputLayer
from ercsvd_deploy.models.compressed.replacement import canonical_name, replace_linears
from ercsvd_deploy.models.experts.routed import are_separate, separate_experts, stacks_experts

_PACKED_LEAVES = (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE, WEIGHT_ZERO_POINT)
# Matches tensor names of the compressed format, and captures the module's name.
_FORMAT_TENSOR = re.compile(
    rf"^(?P<module>.+?)\.(?:(?:{'|'.join(FACTOR_PARTS)})\.[^.]+|{'|'.join((*_PACKED_LEAVES, ROW_ORDER))})$"
)
_INTEGER_LEAVES = (WEIGHT_PACKED, WEIGHT_SHAPE, WEIGHT_ZERO_POINT, ROW_ORDER)


class ErcSvdConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """A `CheckpointConfig` for transformers: the `quantization_config` of a loaded model's config.

    Args:
        fields: the entries of `quantization_config` in config.json.

    Raises:
        CheckpointFormatError: another format version, or a broken description.
    """

    def __init__(self, **fields: Any) -> None:
        self.checkpoint = CheckpointConfig.read({"quant_method": QUANT_METHOD} | fields)
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `quantization_config` in config.json."""
        return self.checkpoint.write()


class ErcSvdQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Puts in the modules of compressed Linears before loading, and refuses tensors that do not fit them."""

    requires_calibration = True  # transformers' name for: only loads checkpoints that are already compressed
    quantization_config: ErcSvdConfig

    def __init__(self, quantization_config: ErcSvdConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if self._has_separate_experts:
            separate_experts(model)
        replaced = replace_linears(model, self.quantization_config.checkpoint)
        _leave_tied_output_layer(model)
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointFormatError(
                "a compressed checkpoint is loaded from its own safetensors files, which are checked first; "
                "pass its directory to from_pretrained, without state_dict or other weight files"
            )
        stored = {name: info for file in checkpoint_files for name, info in read_header(Path(file)).items()}
        problems = find_tensor_problems(replaced, stored)
        if problems:
            raise _unfit(Path(checkpoint_files[0]).parent, problems)
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        problems = []
        for name, tensor in model.state_dict().items():
            shape, dtype = self._expected.get(name, (tensor.shape, tensor.dtype))
            if tensor.shape != shape:
                problems.append(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
            elif tensor.is_floating_point() and tensor.dtype != dtype and not _stays_in_float32(model, name):
                # transformers leaves a tensor that it renames while loading in the checkpoint's dtype
                _cast_in_place(model, name, dtype)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | PackedEmbedding) and not module.weight_shape.is_meta:
                stored_shape, expected_shape = module.weight_shape.tolist(), _described_shape(module)
                if stored_shape != expected_shape:
                    problems.append(f"{name}.{WEIGHT_SHAPE}: says {stored_shape}, expected {expected_shape}")
            if isinstance(module, PivotedLinear) and not module.row_order.is_meta:
                problem = module.row_order_problem()
                problems += [f"{name}.{ROW_ORDER}: {problem}"] if problem else []
        if problems:
            raise _unfit(Path(model.config.name_or_path), problems)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return transformers' conversions of loaded tensors without those that stack separate experts."""
        if not self._has_separate_experts:
            return weight_conversions
        return [conversion for conversion in weight_conversions if not stacks_experts(conversion)]

    @property
    def _has_separate_experts(self) -> bool:
        return are_separate(self.quantization_config.checkpoint.modules)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes, the modules' state dict has the tensors of the format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether all matrices get gradients: only if none is stored as integers."""
        modules = self.quantization_config.checkpoint.modules.values()
        return all(quantization is None for module in modules for _, quantization in module.parts.values())


def register() -> None:
    """Register quant_method "ercsvd" with transformers, unless it is registered already."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(ErcSvdConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(ErcSvdQuantizer)


def find_tensor_problems(modules: Mapping[str, nn.Module], stored: Mapping[str, TensorInfo]) -> list[str]:
    """Return a line for every missing, surplus, wrongly shaped or wrongly typed tensor of compressed modules.

    Args:
        modules: module that takes the tensors, bias included, by its checkpoint name.
        stored: shape and dtype of every tensor in the checkpoint, by name.
    """
    expected = {
        f"{module_name}.{name}": tuple(tensor.shape)
        for module_name, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    stored_names = {canonical_name(name): name for name in stored}
    problems = []
    for name, shape in expected.items():
        stored_name = stored_names.get(canonical_name(name))
        if stored_name is None:
            problems.append(f"{name}: missing")
            continue
        info = stored[stored_name]
        kind = "integers" if name.endswith(_INTEGER_LEAVES) else "floats"
        if info.shape != shape:
            problems.append(f"{stored_name}: shape {list(info.shape)}, expected {list(shape)}")
        elif info.dtype.startswith("I") != (kind == "integers"):
            problems.append(f"{stored_name}: dtype {info.dtype}, expected {kind}")
    expected_names = {canonical_name(name) for name in expected}
    described = tuple(canonical_name(name) + "." for name in modules)
    for canonical, stored_name in stored_names.items():
        if canonical in expected_names:
            continue
        if canonical.startswith(described):
            problems.append(f"{stored_name}: surplus, its module's description has no such tensor")
        elif _FORMAT_TENSOR.match(stored_name):
            problems.append(f"{stored_name}: surplus, its module is not described")
    return problems


def _leave_tied_output_layer(model: PreTrainedModel) -> None:
    """Stop transformers from tying an output layer that uses the embedding's integers already."""
    output_layer = model.get_output_embeddings()
    if isinstance(output_layer, TiedOutputLayer):
        [name] = [name for name, module in model.named_modules() if module is output_layer]
        tied: dict[str, str] = model.all_tied_weights_keys
        model.all_tied_weights_keys = {
            target: source for target, source in tied.items() if target != f"{name}.{WEIGHT}"
        }


def _described_shape(module: PackedLinear | PackedEmbedding) -> list[int]:
    if isinstance(module, PackedEmbedding):
        return [module.num_embeddings, module.embedding_dim]
    return [module.out_features, module.in_features]


def _stays_in_float32(model: PreTrainedModel, name: str) -> bool:
    patterns = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    return any(re.search(pattern, name) for pattern in patterns)


def _cast_in_place(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor = getattr(module, leaf)
    tensor.data = tensor.data.to(dtype)


def _unfit(directory: Path, problems: list[str]) -> CheckpointFormatError:
    listed = "\n  ".join(problems)
    return CheckpointFormatError(
        f"{len(problems)} tensors in {directory} do not fit its quantization_config; "
        f"the files are incomplete or were edited: copy or export the checkpoint again\n  {listed}"
    )


# The one import side effect of the package: users expect `import ercsvd_deploy.hf` to be enough.
register()
