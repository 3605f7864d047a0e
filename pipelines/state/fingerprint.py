"""What each stage's results depend on, as values that two runs can compare.

A stage is started over if anything in its fingerprint differs: the model's files, the data, the settings of
this stage and of those before it, this package's own code, the libraries, the device and precision. File
contents are hashed once, and remembered as long as a file's size, times and identity stay the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ercsvd_deploy
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.atomic_files import read_json, write_json_atomically
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import OpenedModel
from ercsvd_deploy.pipelines.inputs.run_data import RunData
from ercsvd_deploy.pipelines.planning.rank_steps import resolve_rank_steps, resolve_vision_steps
from ercsvd_deploy.pipelines.state.cache import file_digest
from ercsvd_deploy.recipe.load import canonical
from ercsvd_deploy.recipe.sections import Recipe

_LIBRARIES = ("torch", "transformers", "compressed-tensors", "numpy")
_HASHES_FILE = "model-files.json"


@dataclass(frozen=True)
class Fingerprints:
    """One fingerprint for each stage of a run."""

    sensitivity: Mapping[str, Any]
    factorize: Mapping[str, Any]  # of the vision parts and the decoder
    recover: Mapping[str, Any]
    quantize: Mapping[str, Any]
    recover_quantized: Mapping[str, Any]
    quality: Mapping[str, Any]  # of the comparison with the original


def take_fingerprints(
    recipe: Recipe, opened: OpenedModel, data: RunData, model: LayerwiseModel, work: Path
) -> Fingerprints:
    """Return the fingerprints of a run.

    Args:
        recipe: The recipe.
        opened: Where the model's files are.
        data: What the recipe's texts and pictures became.
        model: Tells device and precision.
        work: Where file hashes are remembered.
    """
    settings = canonical(recipe)
    stages: dict[str, Any] = {}
    for entry in settings["stages"]:
        [(kind, stage)] = entry.items()
        stages["recover_quantized" if kind == "recover" and "quantize" in stages else kind] = stage
    base = {
        "model": _model_files(opened.directory, work),
        "model_dtype": recipe.model.dtype,
        "device": str(model.device),
        "precision": str(model.dtype),
        "code": _own_code(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    calibrated = base | {"calibration_samples": _samples(data.samples or ())}
    # What ranks are multiples of follows from the quantize stage, and for pivots from tensor parallel sizes;
    # what else those say, factors do not depend on.
    steps = [
        asdict(resolve(recipe, model.architecture))
        for resolve in (resolve_rank_steps, resolve_vision_steps)
        if recipe.factorize
    ]
    factors = calibrated | {
        "vision": _switches(settings["vision"]),
        "factorize": stages.get("factorize"),
        "rank_steps": _digest_of(steps),
    }
    if settings["target"] is not None:
        # Ranks then depend on what quantization does, and on which shapes can be served.
        factors |= {
            "target": settings["target"],
            "quantized_as": stages.get("quantize"),
            "serving": settings["serving"],
        }
    sensitive = calibrated | {"num_fisher_samples": (stages.get("factorize") or {}).get("num_fisher_samples")}
    recover = factors | {"recover": stages.get("recover")}
    quantize = recover | {"quantize": stages.get("quantize")}
    finished = quantize | {"recover_quantized": stages.get("recover_quantized")}
    judged = {
        "texts": {name: _digest([windows]) for name, windows in data.texts.items()},
        "questions": {
            name: _samples([question.sample for question in asked]) for name, asked in data.questions.items()
        },
    }
    return Fingerprints(sensitive, factors, recover, quantize, finished, finished | judged)


def short_digest(fingerprint: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that tell fingerprints apart."""
    return _digest_of(fingerprint)[:16]


def _switches(vision: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what of the vision section is not already in the samples."""
    return vision and {name: vision[name] for name in ("compress_tower", "compress_projector")}


def _model_files(directory: Path, work: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of the model's config and weights."""
    remembered = read_json(work / _HASHES_FILE)
    known = remembered if isinstance(remembered, dict) else {}
    hashes: dict[str, dict[str, Any]] = {}
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        status = path.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        entry = known.get(str(path))
        if not isinstance(entry, dict) or entry.get("identity") != identity or "sha256" not in entry:
            entry = {"identity": identity, "sha256": file_digest(path)}
        hashes[str(path)] = entry
    write_json_atomically(work / _HASHES_FILE, hashes)
    return {Path(name).name: str(entry["sha256"]) for name, entry in hashes.items()}


def _own_code() -> str:
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
    return _digest(tensors)


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([str(plain.dtype), list(plain.shape)]).encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
