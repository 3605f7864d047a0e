"""One judge for all: the mean loss of every held-out window, by plain transformers in bfloat16, as served."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy import stats
from torch.nn import functional


class Judge:
    """The original model, whose decoder Linears are replaced by what a peer made of them."""

    def __init__(self, model: Path, texts: Mapping[str, torch.Tensor]) -> None:
        """Load the model.

        Args:
            model: Its directory.
            texts: Name -> token ids [windows, tokens].
        """
        from transformers import AutoModelForCausalLM

        self.texts = texts
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    @property
    def num_weights(self) -> int:
        """How many weights the decoder's Linears have."""
        return sum(
            tensor.numel()
            for name, tensor in self.original.items()
            if ".layers." in name and tensor.ndim == 2
        )

    def losses(self, weights: Path | None) -> dict[str, list[float]]:
        """Return text -> mean loss of each window in nats; None judges the original.

        Raises:
            ValueError: a decoder Linear is missing, or has another shape.
        """
        replaced = {} if weights is None else load_file(weights)
        linears = {name for name, t in self.original.items() if ".layers." in name and t.ndim == 2}
        if weights is not None and set(replaced) != linears:
            raise ValueError(f"not all decoder Linears were answered: {sorted(linears ^ set(replaced))[:3]}")
        for name, tensor in replaced.items():
            if tensor.shape != self.original[name].shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(self.original[name].shape)}")
        self.model.load_state_dict(self.original | replaced)
        return {name: self._window_losses(windows) for name, windows in self.texts.items()}

    @torch.no_grad()
    def _window_losses(self, windows: torch.Tensor) -> list[float]:
        found = []
        for window in windows:
            logits = self.model(window[None]).logits[0, :-1].float()
            found.append(functional.cross_entropy(logits, window[1:]).item())
        return found


def paired(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over windows, and half the width of its 95 % interval (Student's t)."""
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    number = len(difference)
    width = stats.t.ppf(0.975, number - 1) * difference.std().item() / math.sqrt(number)
    return difference.mean().item(), float(width)
