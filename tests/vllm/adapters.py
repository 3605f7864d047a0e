"""LoRA adapters in peft's format, and the dense models that have one merged into their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import WEIGHTS_FILE

RANK = 8
_ALPHA = 16
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"


def write_adapter(dense: Path, directory: Path, seed: int = 0) -> Path:
    """Write a random adapter for every Linear of a dense llama's decoder; return `directory`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(dense / WEIGHTS_FILE).items():
        module = name.removesuffix(".weight")
        if not module.endswith(_TARGETS):
            continue
        rows, columns = weight.shape
        lora_a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = lora_a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / _FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": _ALPHA,
        "target_modules": _TARGETS,
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merge(dense: Path, adapter: Path, target: Path) -> Path:
    """Write a dense model with the adapter added to its weights, W + alpha / r B A; return `target`."""
    shutil.copytree(dense, target)
    weights, lora = load_file(target / WEIGHTS_FILE), load_file(adapter / _FILE)
    for name in lora:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            change = lora[f"{_PREFIX}{module}.lora_B.weight"].double() @ lora[name].double()
            weight = weights[f"{module}.weight"]
            weights[f"{module}.weight"] = (weight.double() + _ALPHA / RANK * change).to(weight.dtype)
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
    return target
