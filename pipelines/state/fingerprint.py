"""Fingerprints of stages: everything that a stage's result depends on, as values that two runs compare.

A stage is computed again if anything in its fingerprint differs: the model's files, the data, the settings
and the code of this stage and of those before it, the libraries, or the device. File contents are hashed
once; the hash is reused as long as a file's size, times and inode stay the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import ercsvd_deploy
from ercsvd_deploy.format.files.atomic_files import read_json, write_json_atomically
from ercsvd_deploy.format.files.sidecars import sidecars
from ercsvd_deploy.format.files.tensor_store import INDEX_FILE
from ercsvd_deploy.pipelines.state.cache import file_digest
from ercsvd_deploy.pipelines.state.code_version import code_version
from ercsvd_deploy.pipelines.state.device_identity import device_identity
from ercsvd_deploy.recipe.load import canonical

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Sample
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.inputs.model import OpenedModel
    from ercsvd_deploy.pipelines.inputs.run_data import RunData
    from ercsvd_deploy.recipe.sections import Recipe

_LIBRARIES = ("torch", "transformers", "compressed-tensors", "numpy", "scipy")
HASHES_FILE = "model-files.json"
_LOGGED_FROM = 2**30  # bytes; hashing a file of this size takes seconds
logger = logging.getLogger(__name__)


class FingerprintedStage(Protocol):
    """The part of a stage that fingerprints read (`stages.contract.Stage`)."""

    @property
    def name(self) -> str:
        """The stage's name."""
        ...

    @property
    def temporary_for(self) -> str | None:
        """The later stage that alone reads its result, if it does not change the model."""
        ...

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that the stage's result depends on."""
        ...


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of a run's stages.

    Attributes:
        by_stage: Stage name -> fingerprint, JSON values.
        base: The part that all stages share: model, device and libraries.
        data: Digests of the calibration samples, texts and questions.
    """

    by_stage: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, Any]
    data: Mapping[str, Any]

    def provenance(self, recipe: Recipe) -> dict[str, Any]:
        """Return SHA-256 sums and the seed, for the report."""
        return {
            "seed": recipe.calibration.seed if recipe.calibration else None,
            "recipe_sha256": digest_of(canonical(recipe)),
            "code_sha256": _package_digest(),
            "model_files_sha256": dict(self.base["model"]),
            "calibration_sha256": self.data["calibration_samples"],
            "texts_sha256": dict(self.data["texts"]),
            "questions_sha256": dict(self.data["questions"]),
        }

    def digests(self, stages: Iterable[str]) -> dict[str, str]:
        """Return stage name -> digest of its fingerprint."""
        return {name: short_digest(self.by_stage[name]) for name in stages}


def take_fingerprints(
    stages: Sequence[FingerprintedStage],
    recipe: Recipe,
    opened: OpenedModel,
    model: LayerwiseModel,
    data: RunData,
    hashes: Path,
) -> Fingerprints:
    """Return the fingerprints of a run's stages.

    Args:
        stages: The stages in order; each adds its settings to the fingerprint of the stages before it.
        recipe: The recipe.
        opened: The model's files.
        model: The original model, with its device and precision.
        data: The recipe's texts and pictures, tokenized.
        hashes: File that keeps the hashes of the model's files.
    """
    base = {
        "model": model_files(opened.directory, hashes),
        "model_dtype": recipe.model.dtype,
        "device": device_identity(model.device),
        "precision": str(model.dtype),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    digests = {
        "calibration_samples": _samples(data.samples or ()),
        "texts": {name: _digest([windows]) for name, windows in data.texts.items()},
        "questions": {
            name: _samples([question.sample for question in questions])
            for name, questions in data.questions.items()
        },
        "carried_over": {name: file_digest(path) for name, path in sidecars(opened.directory).items()},
    }
    before: Mapping[str, Any] = base | {
        "calibration_samples": digests["calibration_samples"],
        "token_weight": model.token_weight,
    }
    by_stage = {}
    code: dict[str, str] = {}
    for stage in stages:
        code = code | {stage.name: code_version(type(stage).__module__)}
        by_stage[stage.name] = stage.fingerprint(before, digests) | {"code": code}
        if stage.temporary_for is None:
            before = by_stage[stage.name]
    return Fingerprints(by_stage, base, digests)


def short_digest(fingerprint: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of a fingerprint's digest."""
    return digest_of(fingerprint)[:16]


def model_files(directory: Path, hashes_file: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of a model's config, weights, weight index and Python files.

    Args:
        directory: The model's directory.
        hashes_file: File that keeps the hashes between runs.
    """
    cached = read_json(hashes_file)
    cached_entries = cached if isinstance(cached, dict) else {}
    hashes: dict[str, dict[str, Any]] = {}
    patterns = ("*.safetensors", INDEX_FILE, "*.py")
    files = [file for pattern in patterns for file in directory.glob(pattern)]
    for path in sorted([directory / "config.json", *files]):
        status = path.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        entry = cached_entries.get(str(path))
        if not isinstance(entry, dict) or entry.get("identity") != identity or "sha256" not in entry:
            if status.st_size > _LOGGED_FROM:
                logger.info("hashing %s, %.1f GB", path, status.st_size / 1e9)
            entry = {"identity": identity, "sha256": file_digest(path)}
        hashes[str(path)] = entry
    if any(cached_entries.get(name) != entry for name, entry in hashes.items()):
        hashes_file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(hashes_file, cached_entries | hashes)
    return {Path(name).name: str(entry["sha256"]) for name, entry in hashes.items()}


@functools.cache
def _package_digest() -> str:
    """Return the SHA-256 of this package's source files."""
    root = Path(ercsvd_deploy.__file__).resolve().parent
    folders = (root, root / "pipelines", root / "exporters")
    files = sorted({file.resolve() for folder in folders for file in folder.resolve().rglob("*.py")})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _samples(samples: Sequence[Sample]) -> str:
    tensors = []
    for sample in samples:
        tensors += [sample.tokens, *(sample.images[name] for name in sorted(sample.images))]
        tensors += [] if sample.token_weights is None else [sample.token_weights]
        tensors += [sample.token_types[name] for name in sorted(sample.token_types)]
    return _digest(tensors)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([str(plain.dtype), list(plain.shape)]).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
