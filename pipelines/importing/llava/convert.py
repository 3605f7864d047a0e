"""Convert an original-format LLaVA checkpoint to the hub's layout, which everything else reads.

Config, tensor names, vocabulary and processor change; the weights do not. Memory holds one shard at a time,
and an unsupported checkpoint is refused before the first tensor is read.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ercsvd_deploy.exporters.vllm.directory.target import check_target
from ercsvd_deploy.exporters.vllm.directory.writer import write_weights
from ercsvd_deploy.format.files.sidecars import licences
from ercsvd_deploy.format.files.tensor_store import torch_dtype
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model
from ercsvd_deploy.pipelines.importing.llava.config import (
    LlavaImportError,
    OriginalLlava,
    padded_vocab_size,
    read_original,
)
from ercsvd_deploy.pipelines.importing.llava.processor import (
    IMAGE_TOKEN,
    make_processor,
    open_tokenizer,
    save_processor,
)
from ercsvd_deploy.pipelines.importing.llava.tower import VisionTower, open_tower
from ercsvd_deploy.pipelines.importing.llava.weights import (
    EMBEDDING,
    check_against,
    gather,
    holds_tower,
    open_weights,
)
from ercsvd_deploy.pipelines.inputs.libraries import import_transformers
from ercsvd_deploy.pipelines.inputs.model import fetch
from ercsvd_deploy.pipelines.state.lock import work_directory

_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ImportedLlava:
    """A finished directory.

    Attributes:
        directory: The directory.
        model_type: transformers' model type.
        conversation: The conversation format of its chat template.
        vision_tower: The origin of the tower's weights.
        parameters: Parameters of the whole model.
        num_bytes: Bytes of all tensors.
    """

    directory: Path
    model_type: str
    conversation: str
    vision_tower: str
    parameters: int
    num_bytes: int


def import_llava(
    source: str,
    target: Path,
    *,
    vision_tower: str | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> ImportedLlava:
    """Write an original-format LLaVA checkpoint to `target` in the layout of the hub.

    Args:
        source: Its directory or hub name.
        target: The directory to create; it appears when it is complete.
        vision_tower: Directory or hub name of the CLIP model, instead of the one the checkpoint names.
        max_shard_bytes: Upper size of a safetensors file.

    Raises:
        LlavaImportError: the checkpoint, its tower or its tokenizer cannot be imported; the message says
            what is wrong and what is supported.
        ArchitectureError: something cannot be fetched from the hub.
        CheckpointError: weights are missing or damaged.
        ExportError, TargetInUseError: the target cannot be written to.
    """
    import_transformers()
    directory = Path(source)
    if not directory.is_dir():
        directory = fetch(source, named_by="source")
    target = target.absolute()
    _check_target(target, directory)
    original = read_original(directory)
    checkpoint = open_weights(directory)
    tokenizer = open_tokenizer(directory, original)
    tower = open_tower(directory, original.vision_tower, vision_tower)
    _check_feature_layer(original, tower)
    processor = make_processor(original, tower, tokenizer)

    num_rows = original.text_config.vocab_size
    vocab_size = padded_vocab_size(max(num_rows, len(tokenizer)))
    store = gather(checkpoint, tower, vocab_size)
    config = original.as_transformers(
        tower.config,
        vocab_size=vocab_size,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch_dtype(store.info(EMBEDDING).dtype),
    )
    model = build_meta_model(config)
    check_against(model, store, num_rows)
    architecture = describe(model, config)

    with work_directory(target) as work:
        partial = work / "import"
        partial.mkdir()
        num_bytes = write_weights(partial, store, architecture, max_shard_bytes)
        save_processor(processor, partial)
        _write_generation_config(partial, original, tokenizer.pad_token_id)
        for name in licences(directory, with_notices=True):
            shutil.copyfile(directory / name, partial / name)
        # Last: without a config.json no loader treats the directory as a model.
        config.save_pretrained(partial)
        partial.rename(target)  # the target does not exist, or is empty
    return ImportedLlava(
        directory=target,
        model_type=config.model_type,
        conversation=original.conversation,
        vision_tower="in the checkpoint" if holds_tower(checkpoint) else tower.name,
        parameters=architecture.total_parameters,
        num_bytes=num_bytes,
    )


def _check_target(target: Path, source: Path) -> None:
    """Refuse a target that exists and is not empty.

    Raises:
        LlavaImportError, ExportError: the target is not empty, or cannot be written to.
    """
    if target.is_dir() and any(target.iterdir()):
        raise LlavaImportError(f"{target} exists and is not empty: remove it or choose another directory")
    check_target(target, source)


def _check_feature_layer(original: OriginalLlava, tower: VisionTower) -> None:
    num_layers = tower.config.num_hidden_layers
    if not -num_layers - 1 <= original.feature_layer <= num_layers:
        raise LlavaImportError(
            f"mm_vision_select_layer {original.feature_layer} is not in vision tower {tower.name}, which has "
            f"{num_layers} layers"
        )


def _write_generation_config(directory: Path, original: OriginalLlava, pad_token_id: int) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        bos_token_id=original.text_config.bos_token_id,
        eos_token_id=original.text_config.eos_token_id,
        pad_token_id=pad_token_id,
    ).save_pretrained(directory)
