"""What a family's tiny model becomes in a run, and whether vLLM computes with it what transformers does."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from ercsvd_deploy.models.families import attention_implementation
from ercsvd_deploy.models.meta import load_config
from ercsvd_deploy.models.tested_families import NOT_RUN
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, factorize
from tests.tiny_models import materialise
from tests.vllm.engines import PROMPTS, compare, engine, run_engines

TOLERANCES = {"float32": 1e-4, "float16": 0.03}
# Factors of all Linears; or int4, in half of the layers of factors, in the others of dense matrices.
STAGES: Mapping[str, list[dict[str, Any]]] = {
    "float32": [factorize(num_compressed_layers="all")],
    "float16": [
        factorize(num_compressed_layers=2, compression_ratio=0.2, rank_multiple=32),
        {"quantize": {"bits": 4, "group_size": 32, "method": "gptq"}},
    ],
}


NO_FLOAT16 = "does not support float16"  # vLLM says so of a few families
_Key = TypeVar("_Key", bound=Hashable)


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


def run_all(jobs: Mapping[_Key, dict[str, Any]], work: Path) -> dict[_Key, dict[str, Any]]:
    """Run engines, all in one process as far as they work there; return their answers, or `error` alone.

    Args:
        jobs: Arguments of each engine, under any key.
        work: A directory for answers and logs.
    """
    work.mkdir(parents=True)
    status, _ = run_engines(list(jobs.values()), work / "all.json", goes_on=True)
    answers = [{"error": ""}] * len(jobs) if status else json.loads((work / "all.json").read_text())
    by_key = dict(zip(jobs, answers, strict=True))
    failed = [
        key for key, answer in by_key.items() if "error" in answer and NO_FLOAT16 not in answer["error"]
    ]
    for number, key in enumerate(failed):  # an engine may fail for what another has left behind
        alone = work / f"{number}.json"
        status, printed = run_engines([jobs[key]], alone)
        by_key[key] = {"error": _last_error(printed)} if status else json.loads(alone.read_text())[0]
    return {key: answer | {"dtype": jobs[key]["dtype"]} for key, answer in by_key.items()}


def largest_difference(directory: Path, answer: Mapping[str, Any]) -> float:
    """Return the largest difference of log-probabilities between an engine and a dense model in float32."""
    return compare(reference(directory), answer["outputs"], [{}] * len(PROMPTS)).largest


def judge(export: Path, dtype: str, answer: Mapping[str, Any], work: Path) -> str:
    """Return in a word how vLLM serves an export: `same`, or what vLLM makes of an uncompressed model.

    That is the one that the export stands for: the original's weights may lie where float16 changes little,
    and those of the export where a router sends tokens to other experts.

    Args:
        export: What was made of a model.
        dtype: In which it was served.
        answer: Of its engine.
        work: An empty directory.

    Raises:
        AssertionError: vLLM serves the uncompressed model as transformers does, but not the export.
    """
    dense = materialise(export, work / "dense")
    if "error" not in answer:
        largest = largest_difference(dense, answer)
        if largest <= TOLERANCES[dtype]:
            return "same"
    [original] = run_all({"original": engine(dense, dtype)}, work / "original").values()
    if "error" in original:
        return f"{NOT_RUN}: {original['error']}"[:160]
    assert "error" not in answer, answer["error"]
    of_original = largest_difference(dense, original)
    assert largest <= 2 * of_original, f"off by {largest:.2g}, and by {of_original:.2g} uncompressed"
    return "as far from transformers as the original"


def _last_error(printed: str) -> str:
    errors = [
        line.removeprefix("[rank0]: ").strip()
        for line in printed.splitlines()
        if "Error: " in line or "error, " in line
    ]
    return errors[-1] if errors else printed[-300:]
