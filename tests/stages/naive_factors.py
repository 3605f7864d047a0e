"""Inputs of modules on the calibration windows, and factors by the formulas themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.recipe.load import load_recipe


def inputs_of(directory: Path, recipe_file: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the inputs [windows, tokens, in] of modules on the calibration windows, by transformers."""
    recipe = load_recipe(recipe_file)
    assert recipe.calibration is not None
    tokens = calibration_windows(recipe.calibration, load_tokenizer(recipe.model.path), 256)[0]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.update({name: inputs[0].detach().double()})
        )
    with torch.no_grad():
        model(tokens)
    return seen


def unit_rows(inputs: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
    """Return [tokens, in] with every token divided by its norm, or by that of its original input."""
    norms = (inputs if original is None else original).norm(dim=-1, keepdim=True)
    rows: torch.Tensor = (inputs / norms).flatten(0, -2)
    return rows


def gram(inputs: torch.Tensor) -> torch.Tensor:
    """Return the sum of x x^T over tokens that all count alike, as by `token_weight: unit_norm`."""
    rows = unit_rows(inputs)
    return rows.T @ rows


def naive_erc(weight: torch.Tensor, metric: torch.Tensor, rank: int, residual_rank: int) -> torch.Tensor:
    """Truncate W S by SVD with S the Cholesky factor, undo S, and add the residual's plain truncation."""
    size = len(metric)
    damped = metric + 1e-10 * metric.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    whitening_factor = torch.linalg.cholesky(damped)
    u, s, vh = torch.linalg.svd(weight @ whitening_factor, full_matrices=False)
    first = rank - residual_rank
    product: torch.Tensor = (u[:, :first] * s[:first]) @ vh[:first] @ torch.linalg.inv(whitening_factor)
    u, s, vh = torch.linalg.svd(weight - product, full_matrices=False)
    product += (u[:, :residual_rank] * s[:residual_rank]) @ vh[:residual_rank]
    return product
