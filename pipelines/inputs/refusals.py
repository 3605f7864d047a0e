"""Refuse models that cannot be compressed, judged by their small files and the names of the others.

Of a model on the hub, only config.json and the list of files are fetched for that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.format.files.weight_files import explain_no_weights, has_weights, open_directory
from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.models.description.tasks import find_task
from ercsvd_deploy.pipelines.importing.llava.config import LlavaImportError, is_original
from ercsvd_deploy.pipelines.importing.llava.planned import expected_config

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.sections import ModelSource

# Files in which other tools describe quantized weights when config.json does not -> the tool.
_QUANTIZED_BY: Mapping[str, str] = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
    "quant_model_description.json": "msModelSlim",
}
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
_OWN_METHOD = "ercsvd"
_HUB_SECONDS = 10.0
logger = logging.getLogger(__name__)


def refuse_unsuitable(source: ModelSource, path: str, *, is_for_plan: bool = False) -> Any | None:
    """Refuse a model that cannot be compressed, before its weights are fetched or read.

    Args:
        source: The recipe's section, for messages and for the revision.
        path: Hub id or directory.
        is_for_plan: Whether a LLaVA checkpoint in its authors' format will do, if its config tells enough.

    Returns:
        The config that such a checkpoint will have once it is converted; None for all others.

    Raises:
        ArchitectureError: it is a LLaVA checkpoint in its authors' format, of another kind, is quantized
            already, or has no weights in safetensors.
    """
    directory = Path(path) if Path(path).is_dir() else None
    file_names = list_hub_files(path, source.revision) if directory is None else _list_files(directory)
    # A hub that did not answer once is not asked again: only cached files are used.
    raw = _raw_config(source, path, is_offline=file_names is None)
    expected = None
    if raw is not None:
        expected = _expect_converted(source, raw) if is_for_plan else None
        if expected is None:
            _refuse_original(source, raw)
        _refuse_other_task(source, raw)
        _refuse_described(source, raw)
    if file_names is None:
        return expected
    _refuse_quantized(source, file_names, directory)
    hint = None if has_weights(file_names) else explain_no_weights(file_names)
    if hint is not None:
        raise ArchitectureError(f"model.path {source.path}: has no weights that can be read: {hint}")
    return expected


def list_hub_files(name: str, revision: str | None) -> list[str] | None:
    """Return the names of the files of a hub model, without folders; None if the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS).siblings or []
    except Exception as error:  # noqa: BLE001 - of whichever HTTP library the hub's client uses
        logger.debug("%s: the hub did not list its files: %s", name, error)  # fetching reports what is wrong
        return None
    return [sibling.rfilename for sibling in siblings if "/" not in sibling.rfilename]


def _list_files(directory: Path) -> list[str] | None:
    """Return the names of a directory's files; None if it cannot be read, which is reported later."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError:
        return None


def _raw_config(source: ModelSource, path: str, *, is_offline: bool) -> Mapping[str, Any] | None:
    """Return the contents of config.json; None if it cannot be read, which is reported later."""
    from transformers import PreTrainedConfig

    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=source.revision, local_files_only=is_offline)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def _expect_converted(source: ModelSource, raw: Mapping[str, Any]) -> Any | None:
    """Return the config that a LLaVA checkpoint in its authors' format will have; None of any other.

    Raises:
        ArchitectureError: it cannot be converted.
    """
    if not is_original(raw):
        return None
    try:
        return expected_config(raw, Path(source.path) / "config.json")
    except LlavaImportError as error:
        raise ArchitectureError(f"model.path {error}") from error


def _refuse_original(source: ModelSource, raw: Mapping[str, Any]) -> None:
    """Refuse a LLaVA checkpoint in its authors' format, which transformers would misread in part."""
    if is_original(raw):
        raise ArchitectureError(
            f"model.path {source.path}: a LLaVA checkpoint in its authors' format; convert it once, with  "
            f"ercsvd import-llava {source.path} DIRECTORY  and set model.path to DIRECTORY"
        )


def _refuse_other_task(source: ModelSource, raw: Mapping[str, Any]) -> None:
    """Refuse encoders, reward models, taggers and draft models: other heads, or no decoders."""
    class_names = raw.get("architectures")
    auto_map = raw.get("auto_map")
    is_custom = source.trust_remote_code and isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    if not isinstance(class_names, list) or not class_names or is_custom:
        return
    if find_task(raw.get("model_type"), class_names) is None:
        raise ArchitectureError(
            f"model.path {source.path}: config.json says that this is a {class_names[0]}: only causal "
            "language models, vision-language models around one, and such decoders that embed or classify "
            "texts, can be compressed"
        )


def _refuse_described(source: ModelSource, raw: Mapping[str, Any]) -> None:
    """Refuse a config by another tool that describes quantized weights, of the model or of a part."""
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    for described in (part[key] for part in parts for key in _QUANTIZATION_KEYS if part.get(key)):
        method = described.get("quant_method") if isinstance(described, dict) else None
        if method != _OWN_METHOD:
            by = method or "by a method that its config does not name"
            raise ArchitectureError(
                f"model.path {source.path}: already quantized ({by}); start from its original weights"
            )


def _refuse_quantized(source: ModelSource, file_names: Sequence[str], directory: Path | None) -> None:
    """Refuse quantized weights that config.json does not mention."""
    for file_name, tool in _QUANTIZED_BY.items():
        if file_name in file_names:
            kind = _algorithm(directory / file_name) if directory is not None else None
            raise ArchitectureError(
                f"model.path {source.path}: already quantized by {tool}{f' ({kind})' if kind else ''}, says "
                f"{file_name}; start from its original weights"
            )
    if directory is None or not has_weights(file_names):
        return
    try:
        store = open_directory(directory)
    except CheckpointError:
        return  # a run needs the weights and says what is wrong with them; planning does not
    name = next((name for name in sorted(store.names()) if store.info(name).dtype.startswith("F8")), None)
    if name is not None:
        float8_tensor = f"{to_module(name)} is stored as {store.info(name).dtype}"
        raise ArchitectureError(
            f"model.path {source.path}: already quantized: {float8_tensor}; start from its original weights"
        )


def _algorithm(path: Path) -> str | None:
    """Return the name of the algorithm in a quantization tool's file; None if it has no known form."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    inner = described.get("quantization") if isinstance(described, dict) else None
    algorithm = inner.get("quant_algo") if isinstance(inner, dict) else None
    return algorithm[:40] if isinstance(algorithm, str) else None
