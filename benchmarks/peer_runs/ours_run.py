"""This package, through `run_recipe`; options: calibration, stages; token_weight, target, cache if named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from peer_job import Job, answer, linear_names, read_job, stored_bytes
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the format
from ercsvd_deploy.pipelines.flow import RunOptions, run_recipe
from ercsvd_deploy.recipe.load import load_recipe


def main() -> None:
    """Run the recipe and multiply the served matrices with the identity."""
    job = read_job()
    original = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    linears = linear_names(original)
    file = job.folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(job)))
    with job.timed():
        cache = job.options.get("cache")
        run_recipe(load_recipe(file), options=RunOptions(cache=Path(cache) if cache else None))
    loaded = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)
    dense = {}
    with torch.no_grad():
        for name in linears:
            module, width = loaded.get_submodule(name), original.get_submodule(name).in_features
            bias = module(torch.zeros(1, width))
            dense[name] = (module(torch.eye(width)) - bias).T
    answer(job, "ercsvd-deploy", dense, stored_bytes(job.checkpoint, linears), job.options.get("note", ""))


def recipe_of(job: Job) -> dict[str, Any]:
    """Return the recipe; it judges nothing, since all peers are judged alike afterwards."""
    options = job.options
    calibration = options["calibration"]
    if "token_weight" in options:
        calibration = calibration | {"token_weight": options["token_weight"]}
    recipe = {
        "model": {"path": str(job.model.resolve()), "dtype": "bfloat16"},
        "calibration": calibration,
        "stages": options["stages"],
        "export": {"format": "vllm", "path": str(job.checkpoint.resolve())},
    }
    return recipe | ({"target": options["target"]} if "target" in options else {})


if __name__ == "__main__":
    main()
