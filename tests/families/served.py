"""What a family's tiny model becomes in a run, and whether vLLM computes with it what transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from ercsvd_deploy.models.families import attention_implementation
from ercsvd_deploy.models.meta import load_config
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, factorize
from tests.tiny_models import materialise
from tests.vllm.engines import PROMPTS, compare, engine, run_engines

TOLERANCES = {"float32": 1e-4, "float16": 0.03}
# Half of the layers as factors, the other half dense; one Linear of each layer stays plain.
STAGES: Mapping[str, list[dict[str, Any]]] = {
    "float32": [factorize(num_compressed_layers="all")],
    "float16": [
        factorize(num_compressed_layers=2, compression_ratio=0.2, rank_multiple=32),
        {"quantize": {"bits": 4, "group_size": 32, "method": "gptq"}},
    ],
}


@dataclass(frozen=True)
class Served:
    """What vLLM's CPU engine does with a family, in a word for each of `TOLERANCES`.

    Attributes:
        float32: Low-rank factors in float32: `same`, or what keeps vLLM from it.
        float16: Factors and dense matrices in int4, in float16.
    """

    float32: str
    float16: str

    def as_json(self) -> dict[str, str]:
        """Return it as plain values."""
        return asdict(self)


def compress(model: Path, directory: Path, dtype: str) -> Path:
    """Run the recipe for one of `TOLERANCES` on a model; return the export."""
    directory.mkdir()
    stages = STAGES[dtype]
    recipe = {
        "model": {"path": str(model)},
        "calibration": {
            "dataset": {"text": str(TEXT / "calibration.txt")},
            "num_samples": 16,
            "sequence_length": 48,
        },
        "stages": stages,
        "evaluation": {"perplexity": {"held_out": str(TEXT / "in_domain.txt")}, "max_sequences": 2},
        "export": {"path": str(directory / "out")},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, export = run_recipe(load_recipe(directory / "recipe.yaml"))
    return export


def reference(directory: Path) -> PreTrainedModel:
    """Return a dense model in float32, with the attention that its config asks for."""
    attention = attention_implementation(load_config(str(directory)))
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    return loaded.eval()


def serve(dense: Path, exports: Mapping[str, Path], work: Path) -> tuple[Served, Mapping[str, str]]:
    """Serve exports by dtype; return what comes of it, and vLLM's class of each Linear that it serves.

    Args:
        dense: The model that was compressed, which vLLM is given where it does not serve an export.
        exports: Dtype -> directory.
        work: An empty directory.

    Raises:
        AssertionError: vLLM serves the original, but not what was made of it.
    """
    engines = [engine(directory, dtype) for dtype, directory in exports.items()]
    status, printed = run_engines(engines, work / "answer.json")
    if status:
        refusal = _refusal(dense, work)
        assert refusal, printed[-6000:]
        return Served(refusal, refusal), {}
    answers = json.loads((work / "answer.json").read_text())
    verdicts = {}
    for (dtype, directory), answer in zip(exports.items(), answers, strict=True):
        made = materialise(directory, work / f"{dtype}-dense")
        largest = _largest_difference(made, answer)
        verdicts[dtype] = "same" if largest <= TOLERANCES[dtype] else _excuse(dense, dtype, largest, work)
    return Served(**verdicts), {name: kind for answer in answers for name, kind in answer["cut"].items()}


def _refusal(dense: Path, work: Path) -> str | None:
    """Return why vLLM does not run the original model; None if it does."""
    status, printed = run_engines([engine(dense, "float32")], work / "original.json")
    if not status:
        return None
    errors = [line.strip() for line in printed.splitlines() if "Error: " in line]
    return f"vLLM does not run the original: {errors[-1] if errors else 'it ended'}"[:120]


def _excuse(dense: Path, dtype: str, largest: float, work: Path) -> str:
    """Return how far vLLM is off with the original too.

    Raises:
        AssertionError: with the original it is not.
    """
    status, printed = run_engines([engine(dense, dtype)], work / f"original-{dtype}.json")
    assert not status, printed[-6000:]
    [answer] = json.loads((work / f"original-{dtype}.json").read_text())
    of_original = _largest_difference(dense, answer)
    assert largest <= 2 * of_original, f"off by {largest:.2g}, and by {of_original:.2g} with the original"
    return "other than transformers, with the original too"


def _largest_difference(directory: Path, answer: Mapping[str, Any]) -> float:
    return compare(reference(directory), answer["outputs"], [{}] * len(PROMPTS)).largest
