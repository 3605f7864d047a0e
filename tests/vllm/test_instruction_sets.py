"""Every kind of export on CPUs with fewer instructions than this one: vLLM then loads another of its builds.

vLLM's CPU wheel holds a build for AVX2, one for AVX-512 and one for AVX-512 with BF16; what a build lacks is
served by plain matrices. The builds below this machine's own are loaded by hiding instructions from torch
(`limited_cpu/sitecustomize.py`); this machine's own build is what all other serving tests run on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ModelDirectory
from tests.forks import REPOSITORY
from tests.tiny_models import compress_at_random
from tests.vllm.engines import deviation, engine, run_engines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# hidden from torch -> whether this machine has it
LOWER_BUILDS = {
    "avx2": torch.cpu._is_avx512_supported(),
    "avx512": torch.cpu._is_avx512_bf16_supported(),
}
BUILDS = [name for name, is_below_this_machine in LOWER_BUILDS.items() if is_below_this_machine] or ["avx2"]
INT4 = {"bits": 4, "group_size": 32, "sym": True}
LIMITS = {"float32": 1e-4, "float16": 0.03}


@pytest.fixture(scope="module")
def directories(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: ModelDirectory,
    low_rank_model: ModelDirectory,
    mixed_model: ModelDirectory,
) -> dict[str, Path]:
    """Return kind of export -> directory."""
    found = {"low_rank": low_rank_model("llama"), "mixed": mixed_model("llama")}
    for kind, quantization in {
        "int8": INT4 | {"bits": 8},
        "zero_points": INT4 | {"sym": False},
        "pivoted": INT4,
    }.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        layers = frozenset({"0"}) if kind == "pivoted" else frozenset()
        compress_at_random(tiny_model("llama"), found[kind], quantization=quantization, pivoted_layers=layers)
    return found


SERVED: dict[int, list[tuple[str, str]]] = {
    1: [
        ("low_rank", "float32"),
        ("low_rank", "bfloat16"),
        ("mixed", "float32"),
        ("mixed", "float16"),
        ("mixed", "bfloat16"),
        ("int8", "float16"),
        ("zero_points", "float16"),
        ("pivoted", "float16"),
    ],
    2: [("mixed", "float16"), ("pivoted", "float32")],
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("build", BUILDS)
def test_every_kind_of_export_on_this_build(
    build: str,
    num_ranks: int,
    directories: dict[str, Path],
    materialised: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    served = SERVED[num_ranks]
    engines: list[dict[str, Any]] = [
        engine(directories[kind], dtype, num_ranks=num_ranks) for kind, dtype in served
    ]
    answers, printed = answered(engines, tmp_path, build)
    for (kind, dtype), answer in zip(served, answers, strict=True):
        found = deviation(materialised(directories[kind]), answer["outputs"])
        if dtype == "bfloat16":
            # as for the server on this random model: bfloat16 costs the dense model as much
            assert found.mean <= 0.05, (kind, dtype)
        else:
            assert found.largest <= LIMITS[dtype], (kind, dtype)
        if (
            dtype == "float32"
        ):  # in 16 bits near ties may fall either way; their log-probabilities are compared
            assert found.same_tokens, (kind, dtype)
    # a line a model, on the first rank
    expected = sum(kind != "low_rank" for kind, _ in served) if build == "avx2" else None
    lines = [line for line in printed.splitlines() if "integer matrices are served as plain" in line]
    assert expected is None or len(lines) == expected, printed[-8000:]
    assert all("MiB more memory on each rank" in line for line in lines)


def test_required_kernels_stop_the_engine_with_the_reason(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    status, printed = run_engines(
        [engine(directories["int8"], "float16")], tmp_path / "answer.json", ERCSVD_REQUIRE_KERNELS="1"
    )
    assert status != 0
    assert "vLLM has no kernel for int8 in groups of 32 here" in printed
    assert re.search(r"q_proj.*: cannot serve \[", printed)


def answered(engines: list[dict[str, Any]], folder: Path, build: str) -> tuple[list[dict[str, Any]], str]:
    """Return what engines generated on a build, and what they printed."""
    answer = folder / "answer.json"
    limits = str(REPOSITORY / "tests/vllm/limited_cpu")
    status, printed = run_engines(engines, answer, PYTHONPATH=limits, ERCSVD_TEST_CPU=build)
    assert status == 0, printed[-8000:]
    answers: list[dict[str, Any]] = json.loads(answer.read_text())
    return answers, printed
