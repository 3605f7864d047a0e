"""Find the model that a recipe names, and open it for streaming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.data.texts import first_line
from ercsvd_deploy.format.files.store_views import CastingStore
from ercsvd_deploy.format.files.tensor_store import TensorStore, enumerate_names
from ercsvd_deploy.format.files.weight_files import open_directory, outside_links
from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.models.description.meta import load_config, own_dtype
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.libraries import import_transformers
from ercsvd_deploy.pipelines.inputs.refusals import refuse_unsuitable
from ercsvd_deploy.recipe.sections import ModelSource

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.models.streaming.statistics import TokenWeight

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (
    *WEIGHT_FILES,
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "README.md",
    "*.tiktoken",
    "*.py",
    "tokenizer*",
    "vocab*",
    "*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "NOTICE*",
    "Notice*",
    "notice*",
    "USE_POLICY*",
    "COPYING*",
    "COPYRIGHT*",
)
# Copies of a model in other formats, which nothing here reads.
NOT_FETCHED = ("*consolidated*", "original/*", "onnx/*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx*")


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files are on this machine."""

    source: ModelSource
    directory: Path
    config: Any

    def store(self) -> TensorStore:
        """Open the weights under the checkpoint's names, in the precision that the recipe asks for.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        files: TensorStore = open_directory(self.directory)
        return (
            files if self.source.dtype == "auto" else CastingStore(files, getattr(torch, self.source.dtype))
        )

    def notes(self) -> list[str]:
        """Return notes on where the weights are read from, for the user."""
        links = outside_links(open_directory(self.directory), self.directory)
        if not links:
            return []
        # The links' targets are left out: notes are published with the export.
        return [f"weights are links to files outside the model's directory: {enumerate_names(links)}"]


def open_config(source: ModelSource) -> Any:
    """Return the model's config; nothing else is fetched from the hub.

    A LLaVA checkpoint in its authors' format is described as it will be once it is converted: a plan needs no
    more, see `import_note`.

    Raises:
        ArchitectureError: it cannot be read, or the model cannot be compressed.
    """
    import_transformers()
    expected = refuse_unsuitable(source, source.path, is_for_plan=True)
    if expected is not None:
        return expected
    return load_config(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)


def open_model(source: ModelSource) -> OpenedModel:
    """Return the model with its files on this machine, fetched from the hub if `path` is not a directory.

    Raises:
        ArchitectureError: there is no such directory or hub model, it cannot be fetched, or it cannot be
            compressed; a hub model is refused before its weights are fetched, if its small files allow that.
    """
    import_transformers()
    directory = Path(source.path)
    refuse_unsuitable(source, source.path)
    if not directory.is_dir():
        directory = fetch(source.path, revision=source.revision, named_by="model.path")
        refuse_unsuitable(source, str(directory))  # if the hub could not list the files before
    config = load_config(str(directory), revision=source.revision, trust_remote_code=source.trust_remote_code)
    return OpenedModel(source, directory, config)


def fetch(
    name: str, *, revision: str | None = None, files: Iterable[str] = MODEL_FILES, named_by: str
) -> Path:
    """Return the local copy of a hub model's files.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None: the default branch.
        files: Patterns of file names.
        named_by: The option or field that names the model, for messages.

    Raises:
        ArchitectureError: there is no such model, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=list(NOT_FETCHED),
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArchitectureError(
            f"{named_by} {name!r} is neither a directory here nor a model that can be fetched from "
            f"the hub: {first_line(error)}"
        ) from error


def default_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_device(name: str | None) -> torch.device | None:
    """Return the device that `--device` names, or None for the default.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return None
    device = parse_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def parse_device(name: str) -> torch.device:
    """Return the device that `--device` names, whether this machine has it or not.

    Raises:
        ValueError: the name is not a device.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from None


def compute_dtype(config: Any, device: torch.device, dtype: str) -> torch.dtype:
    """Return the dtype to run layers in: that of the weights on a GPU, float32 on a CPU.

    Args:
        config: The model's configuration.
        device: Where they run.
        dtype: The recipe's `model.dtype`; "auto" is the model's own.
    """
    model_dtype = own_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    return model_dtype if device.type == "cuda" and model_dtype is not None else torch.float32


def stream(
    opened: OpenedModel,
    device: torch.device,
    store: TensorStore | None = None,
    *,
    token_weight: TokenWeight = "uniform",
    described: Architecture | None = None,
    dtype: torch.dtype | None = None,
) -> LayerwiseModel:
    """Return the model ready to run layer by layer.

    Args:
        opened: The model.
        device: Where layers run.
        store: Weights to use instead of the model's own.
        token_weight: How tokens are weighted in input statistics.
        described: The architecture, if the model or the original it was compressed from has been analysed.
        dtype: Of weights and computation; default that of `compute_dtype`.
    """
    return LayerwiseModel(
        opened.config,
        store if store is not None else opened.store(),
        device,
        dtype or compute_dtype(opened.config, device, opened.source.dtype),
        trust_remote_code=opened.source.trust_remote_code,
        token_weight=token_weight,
        described=described,
    )
