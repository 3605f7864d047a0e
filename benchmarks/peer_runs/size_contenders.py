"""Who is compared at every size: plain and mixed-bit GPTQ, a peer, and what one budget can choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_runs.contenders import BATCH, ERROR_CONTROL, GROUP_SIZE, ITERATIONS, Contender

UNIFORM, MIXED, EARLIER = "uniform GPTQ", "mixed-bit GPTQ", "dense or factors, int4"
ALL, RECOVERED = "all options", "all options, recovered"
MIXED_RECOVERED = "mixed-bit GPTQ, recovered"
PEER, MIXED_PEER = "AutoRound", "AutoRound, mixed bits"
GGUF = "GGUF"
GGUF_TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
METHODS = (UNIFORM, MIXED, EARLIER, ALL, PEER, MIXED_PEER, MIXED_RECOVERED, RECOVERED)

_BITS = [2, 3, 4, 5, 6, 8]
_SCALES = 0.25  # bits of a float16 scale for every group of 64


@dataclass(frozen=True)
class Training:
    """How long whatever trains may train, ours and the peer alike."""

    steps: int = ITERATIONS
    batch_size: int = BATCH

    @property
    def stage(self) -> dict[str, Any]:
        """Our stage of a recipe."""
        return {"recover": {"steps": self.steps, "batch_size": self.batch_size, "rounding": True}}

    @property
    def peer(self) -> dict[str, Any]:
        """The peer's options."""
        return {"group_size": GROUP_SIZE, "iterations": self.steps, "batch_size": self.batch_size}


def size_contenders(
    calibration: dict[str, Any],
    sizes: Sequence[float],
    correction_ranks: Sequence[int],
    cache: Path,
    training: Training,
) -> Iterator[tuple[str, float, Contender]]:
    """Yield method, size in bits per weight of the decoder's Linears, and contender.

    Args:
        calibration: The recipe's section, for ours.
        sizes: Bits per weight.
        correction_ranks: Ranks of low-rank corrections on offer.
        cache: Where what does not depend on the size is kept from one run to the next.
        training: Of what trains.
    """
    for size in sizes:
        bits = round(size - _SCALES)
        if bits in _BITS and bits + _SCALES == size:
            stages: list[dict[str, Any]] = [{"quantize": {"bits": bits, "group_size": GROUP_SIZE}}]
            yield _ours(UNIFORM, size, calibration, stages)
            yield _auto_round(PEER, size, training.peer | {"bits": bits})
        if 2.5 <= size <= 4:
            yield _auto_round(
                MIXED_PEER, size, training.peer | {"mixed_bits": [2, 3, 4, 8], "average_bits": size}
            )
        for method, stages, target in _chosen(size, correction_ranks, training.stage):
            yield _ours(method, size, calibration, stages, target, cache)


def gguf_contenders() -> list[Contender]:
    """Return llama.cpp's types, each of a size of its own."""
    return [
        Contender(f"{GGUF} {kind}", "llama-cpp", "llama_cpp_run.py", {"file_type": kind})
        for kind in GGUF_TYPES
    ]


def _chosen(
    size: float, correction_ranks: Sequence[int], recover: dict[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Yield method, stages and target of what is chosen under one budget."""
    factorize = {"factorize": ERROR_CONTROL}
    integers = {"quantize": {"bits": 4, "group_size": GROUP_SIZE}}
    sizes = {"overall_bits": size}
    mixed = sizes | {"bits": _BITS, "group_sizes": [32, 64, 128]}
    everything = mixed | {
        "factor_bits": [3, 4, 8],
        "corrections": [{"rank": rank, "bits": bits} for rank in correction_ranks for bits in (4, 8)],
    }
    yield EARLIER, [factorize, integers], sizes
    yield MIXED, [integers], mixed
    yield MIXED_RECOVERED, [integers, recover], mixed
    yield ALL, [factorize, integers], everything
    yield RECOVERED, [factorize, integers, recover], everything


def _ours(
    method: str,
    size: float,
    calibration: dict[str, Any],
    stages: list[dict[str, Any]],
    target: dict[str, Any] | None = None,
    cache: Path | None = None,
) -> tuple[str, float, Contender]:
    options: dict[str, Any] = {"calibration": calibration, "stages": stages}
    if target is not None:
        options |= {"target": target, "cache": str(cache)}
    return method, size, Contender(f"{method}, {size} bits", "ours", "ours_run.py", options)


def _auto_round(method: str, size: float, options: dict[str, Any]) -> tuple[str, float, Contender]:
    name = f"{method}, {size} bits"
    return method, size, Contender(name, "auto-round", "auto_round_run.py", options)
