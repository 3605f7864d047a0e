"""What a family's tiny model becomes in a run, and whether vLLM computes with it what transformers does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.description.tested_families import NOT_RUN
from ercsvd_deploy.models.description.vision import reads_images
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.families.dense import materialise
from tests.forks import REPOSITORY
from tests.recipe_runs import TEXT, factorize
from tests.vllm.engines import PROMPTS, compare, engine, run_engines

TOLERANCES = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.24}  # which rounds by eight times as much
# Factors of all Linears; or int4, in half of the layers of factors, in the others of dense matrices.
STAGES: Mapping[str, list[dict[str, Any]]] = {
    "float32": [factorize(num_compressed_layers="all")],
    "float16": [
        factorize(num_compressed_layers=2, compression_ratio=0.2, rank_multiple=32),
        {"quantize": {"bits": 4, "group_size": 32, "method": "gptq"}},
    ],
}


# vLLM's LLaVA imports a module that needs torchvision, for a class that it does not use
_WITHOUT_TORCHVISION = [str(REPOSITORY / "examples/without_torchvision")]
_PATHS = [*_WITHOUT_TORCHVISION, *filter(None, [os.environ.get("PYTHONPATH")])]
_VARIABLES: dict[str, Any] = {} if find_spec("torchvision") else {"PYTHONPATH": os.pathsep.join(_PATHS)}
# What vLLM says of a few families' dtypes -> one that it runs them in.
_OTHER_DTYPES = {"does not support float16": "float32", "CPU GDN attention requires BF16": "bfloat16"}
# How vLLM tells of an error in a worker of tensor parallelism.
_IN_WORKER = re.compile(r"^\(Worker\S* pid=\d+\) ERROR .*?\] ")
_OF_WORKER = re.compile(r"^RuntimeError: Worker failed with error '(.*)', please check")
_TEXTS = tuple(Sample(torch.tensor(tokens)) for tokens in PROMPTS)
_Key = TypeVar("_Key", bound=Hashable)


def compress(model: Path, directory: Path, dtype: str, sections: Mapping[str, Any] | None = None) -> Path:
    """Run the recipe for one of `TOLERANCES`, with some sections replaced, on a model; return the export."""
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
        **(sections or {}),
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, export = run_recipe(load_recipe(directory / "recipe.yaml"))
    return export


def reference(directory: Path) -> PreTrainedModel:
    """Return a dense model in float32, with the attention that its config asks for."""
    config = load_config(str(directory))
    auto = AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    loaded: PreTrainedModel = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention_implementation(config)
    )
    return loaded.eval()


def run_in_their_dtypes(jobs: Mapping[_Key, dict[str, Any]], work: Path) -> dict[_Key, dict[str, Any]]:
    """Run engines as `run_all` does, those of families that do not support a dtype in another one."""
    found = run_all(jobs, work / "first")
    again = {
        key: jobs[key] | {"dtype": other}
        for key, answer in found.items()
        if (other := _other_dtype(answer)) is not None
    }
    return found | (run_all(again, work / "again") if again else {})


def run_all(jobs: Mapping[_Key, dict[str, Any]], work: Path) -> dict[_Key, dict[str, Any]]:
    """Run engines, all in one process as far as they work there; return their answers, or `error` alone.

    Args:
        jobs: Arguments of each engine, under any key.
        work: A directory for answers and logs.
    """
    work.mkdir(parents=True)
    status, _ = run_engines(list(jobs.values()), work / "all.json", goes_on=True, **_VARIABLES)
    answers = [{"error": ""}] * len(jobs) if status else json.loads((work / "all.json").read_text())
    by_key = dict(zip(jobs, answers, strict=True))
    failed = [key for key, answer in by_key.items() if "error" in answer and _other_dtype(answer) is None]
    for number, key in enumerate(failed):  # an engine may fail for what another has left behind
        alone = work / f"{number}.json"
        status, printed = run_engines([jobs[key]], alone, **_VARIABLES)
        by_key[key] = {"error": _last_error(printed)} if status else json.loads(alone.read_text())[0]
    return {key: answer | {"dtype": jobs[key]["dtype"]} for key, answer in by_key.items()}


def _other_dtype(answer: Mapping[str, Any]) -> str | None:
    """Return the dtype in which a family can be run whose engine refused one; None: that was not why."""
    error = answer.get("error", "")
    return next((other for said, other in _OTHER_DTYPES.items() if said in error), None)


def largest_difference(directory: Path, answer: Mapping[str, Any], asked: Sequence[Sample] = _TEXTS) -> float:
    """Return the largest difference of log-probabilities between an engine and a dense model in float32."""
    inputs = []
    for output, sample in zip(answer["outputs"], asked, strict=True):
        assert output["prompt"] == sample.tokens.tolist()
        types = sample.continued(output["tokens"]).token_types
        inputs.append({**sample.images, **{name: kinds[None] for name, kinds in types.items()}})
    return compare(reference(directory), answer["outputs"], inputs).largest


def judge(
    dense: Path,
    export: Path,
    answer: Mapping[str, Any],
    work: Path,
    options: Mapping[str, Any] | None = None,
    asked: Sequence[Sample] = _TEXTS,
    num_ranks: int = 1,
) -> str:
    """Return in a word how vLLM serves an export: `same`, or what vLLM makes of the original itself.

    Args:
        dense: The uncompressed model that the export stands for, since float16 is far from float32 with
            some weights and not with others (routers send tokens elsewhere).
        export: What was made of it.
        answer: Of its engine, with the dtype in which it was served.
        work: An empty directory.
        options: Of the engine, beside those of `engine`.
        asked: What it has read.
        num_ranks: Its tensor parallel size.

    Raises:
        AssertionError: vLLM serves the original as transformers does, but not the export.
    """
    dtype = answer["dtype"]
    if "error" not in answer:
        largest = largest_difference(materialise(export, work / "dense"), answer, asked)
        if largest <= TOLERANCES[dtype]:
            return "same"
    of_dense = engine(dense, dtype, num_ranks=num_ranks) | dict(options or {})
    [original] = run_all({"original": of_dense}, work / "original").values()
    if "error" in original:
        return f"{NOT_RUN}: {_as_on_one_rank(original['error'])}"[:160]
    assert "error" not in answer, answer["error"]
    of_original = largest_difference(dense, original, asked)
    assert largest <= 2 * of_original, f"off by {largest:.2g}, and by {of_original:.2g} with the original"
    return "as far from transformers as the original"


def in_dtype(verdict: str, dtype: str, answer: Mapping[str, Any]) -> str:
    """Return a verdict, with the dtype in which an export was served if that is not its own `dtype`."""
    return verdict if answer["dtype"] == dtype else f"{verdict} in {answer['dtype']}"


def _as_on_one_rank(error: str) -> str:
    """Return an error without what tensor parallelism puts around it."""
    error = _IN_WORKER.sub("", error)
    told = _OF_WORKER.match(error)
    return error if told is None else f"RuntimeError: {told[1]}"


def _last_error(printed: str) -> str:
    errors = [
        line.removeprefix("[rank0]: ").strip()
        for line in printed.splitlines()
        if "Error: " in line or "error, " in line
    ]
    return errors[-1] if errors else printed[-300:]
