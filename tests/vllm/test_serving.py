"""Compressed checkpoints in real vLLM engines, in processes of their own, against the models they stand for.

`ERCSVD_VLLM_PYTHON` names the interpreter of another environment, to test another vLLM release. Engines start
in 10 to 20 seconds each; those that can share a process do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import ModelDirectory
from tests.tiny_models import FAMILIES, compress_at_random
from tests.vllm.engines import (
    MAX_TOKENS,
    PROMPTS,
    TOP,
    TRACED,
    deviation,
    engine,
    generate,
    run_engines,
    serving,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

INT4 = {"bits": 4, "group_size": 32, "sym": True}
OTHER_BITS = [INT4 | {"bits": bits, "sym": bits % 2 == 0} for bits in (2, 3, 5, 6, 8)]
SEED = 35  # of a model whose greedy tokens all lead by more than float16 can change
Materialised = Callable[[Path], Path]


@pytest.fixture(scope="module")
def corrected_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> Path:
    """Return a model whose first layer has integers with low-rank corrections."""
    directory = tmp_path_factory.mktemp("corrected")
    compress_at_random(tiny_model("llama"), directory, quantization=INT4, corrected="all")
    return directory


@pytest.fixture(scope="module")
def other_bits(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> Path:
    """Return a model of integers for which no kernel of a CPU is made, mixed in fused layers too."""
    directory = tmp_path_factory.mktemp("other-bits")
    compress_at_random(tiny_model("llama"), directory, quantization=OTHER_BITS)
    return directory


@pytest.fixture(scope="module")
def single_rank(
    tmp_path_factory: pytest.TempPathFactory,
    low_rank_model: ModelDirectory,
    mixed_model: ModelDirectory,
    corrected_model: Path,
    other_bits: Path,
) -> dict[str, dict[str, Any]]:
    """Return what engines of one rank generated: families in float32, int4 in float16, two compiled."""
    engines = {family: engine(low_rank_model(family), "float32") for family in FAMILIES}
    engines["int4"] = engine(mixed_model("llama"), "float16")
    engines["other bits"] = engine(other_bits, "float16")
    engines["compiled"] = engine(low_rank_model("qwen2"), "float32", eager=False)
    engines["corrected"] = engine(corrected_model, "float16", eager=False) | TRACED
    answers = generate(list(engines.values()), tmp_path_factory.mktemp("engines") / "answer.json")
    return dict(zip(engines, answers, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_low_rank_equals_the_dense_model(
    family: str,
    single_rank: dict[str, dict[str, Any]],
    low_rank_model: ModelDirectory,
    materialised: Materialised,
) -> None:
    found = deviation(materialised(low_rank_model(family)), single_rank[family]["outputs"])
    assert found.largest <= 1e-4
    assert found.same_tokens


def test_float16_int4_mixed_with_dense_and_low_rank(
    single_rank: dict[str, dict[str, Any]], mixed_model: ModelDirectory, materialised: Materialised
) -> None:
    found = deviation(materialised(mixed_model("llama")), single_rank["int4"]["outputs"])
    assert found.largest <= 0.03
    assert found.same_tokens


def test_float16_integers_of_other_bits(
    single_rank: dict[str, dict[str, Any]], other_bits: Path, materialised: Materialised
) -> None:
    found = deviation(materialised(other_bits), single_rank["other bits"]["outputs"])
    assert found.largest <= 0.03


def test_float16_integers_with_corrections_compiled(
    single_rank: dict[str, dict[str, Any]], corrected_model: Path, materialised: Materialised
) -> None:
    assert single_rank["corrected"]["compiled"]
    found = deviation(materialised(corrected_model), single_rank["corrected"]["outputs"])
    assert found.largest <= 0.03
    assert found.same_tokens


def test_compiled_engine(
    single_rank: dict[str, dict[str, Any]], low_rank_model: ModelDirectory, materialised: Materialised
) -> None:
    assert single_rank["compiled"]["compiled"]
    assert not single_rank["qwen2"]["compiled"]
    found = deviation(materialised(low_rank_model("qwen2")), single_rank["compiled"]["outputs"])
    assert found.largest <= 1e-4
    assert found.same_tokens


def test_tensor_parallel_engines(
    tiny_model: ModelDirectory,
    low_rank_model: ModelDirectory,
    corrected_model: Path,
    other_bits: Path,
    materialised: Materialised,
    tmp_path: Path,
) -> None:
    mixed = tmp_path / "mixed"
    compress_at_random(tiny_model("llama"), mixed, seed=SEED, quantization=INT4)
    engines = [
        engine(low_rank_model("qwen2"), "float32", num_ranks=2),
        engine(mixed, "float16", num_ranks=2, eager=False) | TRACED,
        engine(corrected_model, "float16", num_ranks=2),
        engine(other_bits, "float16", num_ranks=2),
    ]
    float32, int4, corrected, others = generate(engines, tmp_path / "answer.json")
    found = deviation(materialised(low_rank_model("qwen2")), float32["outputs"])
    assert found.largest <= 1e-4
    assert found.same_tokens
    assert int4["compiled"]
    for directory, answer in ((mixed, int4), (corrected_model, corrected)):
        found = deviation(materialised(directory), answer["outputs"])
        assert found.largest <= 0.03
        assert found.same_tokens
    assert deviation(materialised(other_bits), others["outputs"]).largest <= 0.03


def test_engine_refuses_a_damaged_checkpoint(low_rank_model: ModelDirectory, tmp_path: Path) -> None:
    damaged = shutil.copytree(low_rank_model("llama"), tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    q, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    del tensors[f"{q}.factor_b.weight"]
    tensors[f"{q}.factor_b.weight_packed"] = torch.zeros(2, 2, dtype=torch.int32)
    tensors[f"{v}.factor_a.weight"] = tensors[f"{v}.factor_a.weight"][:-1].contiguous()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    status, printed = run_engines([engine(damaged, "float32")], tmp_path / "answer.json")
    assert status != 0
    assert "3 problems" in printed
    assert f"missing: {q}.factor_b.weight" in printed
    assert f"surplus: {q}.factor_b.weight_packed [2, 2]" in printed
    assert f"mis-shaped: {v}.factor_a.weight is" in printed


def test_server_needs_no_flags(
    mixed_model: ModelDirectory, materialised: Materialised, tmp_path: Path
) -> None:
    request = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": TOP}
    as_ids = {"return_tokens_as_token_ids": True}
    with serving(mixed_model("llama"), tmp_path / "server.log") as post:
        answers = [post("completions", request | as_ids | {"prompt": prompt}) for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(materialised(mixed_model("llama")), dtype=torch.float32)
    differences: list[float] = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = [int(token.removeprefix("token_id:")) for token in answer["logprobs"]["tokens"]]
        assert len(tokens) == MAX_TOKENS
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        differences += (chosen - torch.tensor(answer["logprobs"]["token_logprobs"])).abs().tolist()
    # the dtype is vLLM's choice, 16 bits wide; bfloat16 costs the dense model as much
    assert sum(differences) / len(differences) <= 0.05
