"""Where a result comes from: hashes of the model's files, the data, the recipe and this package's code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ercsvd_deploy.pipelines.state.fingerprint import Fingerprints
from ercsvd_deploy.recipe.load import canonical
from ercsvd_deploy.recipe.sections import Recipe


def describe_provenance(recipe: Recipe, fingerprints: Fingerprints) -> dict[str, Any]:
    """Return SHA-256 sums and the seed, as JSON values."""
    taken = fingerprints.quality
    settings = json.dumps(canonical(recipe), sort_keys=True).encode()
    return {
        "seed": recipe.calibration.seed if recipe.calibration else None,
        "recipe_sha256": hashlib.sha256(settings).hexdigest(),
        "code_sha256": taken["code"],
        "model_files_sha256": dict(taken["model"]),
        "calibration_sha256": taken["calibration_samples"],
        "texts_sha256": dict(taken["texts"]),
        "questions_sha256": dict(taken["questions"]),
    }
