"""What devices hold of a planned model: kernels pad, and what none of them takes is held in 16 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ercsvd_deploy.exporters.vllm.kernels.choice import ACCELERATORS, NO_KERNEL, KernelUse
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.reporting.screen.plan_tables import render
from ercsvd_deploy.recipe.sections import Recipe
from tests.planning.public_configs import text_config

GPUS = [name for name in ACCELERATORS if name != "CPU"]
UNTIED = text_config("llama", 512, 1024, 2, 8, 4, tie_word_embeddings=False)
TIED = UNTIED | {"tie_word_embeddings": True}
MIXTRAL = text_config("mixtral", 512, 1024, 2, 8, 4, tie_word_embeddings=False, num_local_experts=4)
NOTED = 1e-5  # relative: files note the shape of a matrix beside its integers
HEAD = {"lm_head": {"bits": 8, "group_size": 64}}


def planned(directory: Path, config: dict[str, Any], export_format: str = "vllm", **quantize: Any) -> Plan:
    """Plan integers in groups of 64 for a model that is a config alone."""
    (directory / "config.json").write_text(json.dumps(config))
    recipe = {
        "model": {"path": str(directory), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration.txt"},
            "num_samples": 256,
            "sequence_length": 512,
        },
        "stages": [{"quantize": {"group_size": 64, **quantize}}],
        "serving": {"tensor_parallel_sizes": [1, 2]},
        "export": {"format": export_format, "path": str(directory / "out")},
    }
    return make_plan(Recipe.model_validate(recipe))


@pytest.mark.vllm
@pytest.mark.parametrize(("config", "quantize"), [(UNTIED, HEAD), (TIED, HEAD), (TIED, {}), (MIXTRAL, HEAD)])
def test_where_no_kernel_takes_anything_a_device_holds_the_dense_model(
    config: dict[str, Any], quantize: dict[str, Any], tmp_path: Path
) -> None:
    plan = planned(tmp_path, config, bits=3, **quantize).with_kernels()
    for size, dense in plan.gpu_bytes.items():
        assert plan.held_bytes(size)["CPU"] == pytest.approx(dense, rel=NOTED)
        assert plan.candidates[-1].gpu_bytes[size] < 0.9 * dense


@pytest.mark.vllm
@pytest.mark.parametrize("bits", [3, 4])
def test_gpus_hold_experts_as_integers_where_fused_kernels_take_them(bits: int, tmp_path: Path) -> None:
    plan = planned(tmp_path, MIXTRAL, bits=bits).with_kernels()
    for size in (1, 2):
        stored, held = plan.candidates[-1].gpu_bytes[size], plan.held_bytes(size)
        stored_of_experts = 2 * 4 * 3 * 512 * (1024 // size) * (bits + 16 / 64) / 8
        in_16_bits = 2 * 2 * 4 * 3 * 512 * (1024 // size)
        extra = in_16_bits - stored_of_experts if bits == 3 else 0
        assert [held[name] for name in GPUS] == pytest.approx([stored + extra] * len(GPUS), rel=NOTED)


def test_experts_alone_are_counted_too(tmp_path: Path) -> None:
    """No Linear is integers then, and vLLM is not asked."""
    plan = planned(tmp_path, MIXTRAL, bits=4, ignore=["self_attn.*"]).with_kernels()
    stored, held = plan.candidates[-1].gpu_bytes[1], plan.held_bytes(1)
    assert {held[name] for name in GPUS} == {stored}
    assert held["CPU"] == pytest.approx(plan.gpu_bytes[1], rel=NOTED)


def test_kernels_of_each_device_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_extra_bytes(uses: tuple[KernelUse, ...], _dtype: str, **_: bool) -> SimpleNamespace:
        kernels, extra = {"CPU": NO_KERNEL, "Hopper": "Machete"}, {"CPU": 5, "Hopper": 0}
        answered = tuple(replace(use, kernels=kernels, extra_bytes=extra) for use in uses)
        return SimpleNamespace(uses=answered, source="vLLM", problem=None)

    monkeypatch.setattr("ercsvd_deploy.pipelines.planning.plan.ask_kernels", with_extra_bytes)
    asked = planned(tmp_path, UNTIED, bits=4)
    assert asked.held_bytes(1) == {}
    plan = asked.with_kernels()
    stored = plan.candidates[-1].gpu_bytes[1]
    num_matrices = sum(use.layers for use in plan.kernels if use.tensor_parallel_size == 1)
    held = {"CPU": stored + 5 * num_matrices, "Hopper": stored}
    assert plan.held_bytes(1) == plan.as_json()["held_bytes"][1] == held
    printed = StringIO()
    Console(width=200, file=printed).print(render(plan))
    assert "as its kernels hold them" in " ".join(printed.getvalue().split())


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("export_format", "expected", "devices"),
    [("vllm", NO_KERNEL, set(ACCELERATORS)), ("auto-round", "none: does not start", set(GPUS))],
)
def test_a_missing_kernel_means_what_the_format_makes_of_it(
    export_format: str, expected: str, devices: set[str], tmp_path: Path
) -> None:
    """Stock vLLM holds nothing where it does not start."""
    plan = planned(tmp_path, UNTIED, export_format=export_format, bits=3).with_kernels()
    assert {use.kernels["CPU"] for use in plan.kernels} == {expected}
    assert {use.kernels["Hopper"] for use in plan.kernels} == {"Humming"}
    assert set(plan.held_bytes(1)) == devices
