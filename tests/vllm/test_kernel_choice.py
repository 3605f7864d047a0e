"""What a plan says of kernels is what vLLM says: it is asked, and nothing is said where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ercsvd_deploy.exporters.vllm.kernels import choice as kernel_choice
from ercsvd_deploy.exporters.vllm.kernels.choice import (
    ACCELERATORS,
    DOES_NOT_START,
    NO_KERNEL,
    PLAIN,
    SMALLER_PLAIN,
    KernelUse,
    ask_kernels,
    columns_that_agree,
)
from ercsvd_deploy.exporters.vllm.layers.layer_plan import Projection, plan_second, plan_stacks
from ercsvd_deploy.format.schema import Bits, Storage, WeightQuantization
from ercsvd_deploy.pipelines.cli.app import app
from tests.conftest import ModelDirectory

LIMITED_CPU = Path(__file__).parent / "limited_cpu"
GPUS = [name for name in ACCELERATORS if name != "CPU"]
SHAPES = [(128, 4096), (96, 4096), (4096, 96), (100, 128)]
_BITS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
PER_CHANNEL_INT4 = WeightQuantization(bits=4, group_size=-1, sym=True)
STORAGES = [
    WeightQuantization(bits=bits, group_size=group_size, sym=sym)
    for bits in _BITS
    for sym in (True, False)
    for group_size in (-1, 32, 64, 128)
]


def use(rows: int, columns: int, storage: WeightQuantization | None) -> KernelUse:
    quantization = None if storage is None else storage.model_dump()
    return KernelUse(1, ("matrix",), rows, columns, rows, columns, "", quantization, 1)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[Any, ...], KernelUse]:
    """(rows, columns, bits, group size, symmetric) -> what vLLM said, all in one question."""
    asked = [
        use(*shape, storage)
        for shape in SHAPES
        for storage in STORAGES
        if storage.group_size == -1 or shape[1] % storage.group_size == 0
    ]
    answered = ask_kernels(asked, "bfloat16")
    assert answered.problem is None
    assert answered.source is not None
    assert answered.source.startswith("vLLM ")
    found = {}
    for each in answered.uses:
        assert each.quantization is not None
        found[each.rows, each.columns, *each.quantization.values()] = each
    return found


@pytest.mark.vllm
def test_gpus_are_told_apart(answers: dict[tuple[Any, ...], KernelUse]) -> None:
    aligned, odd = answers[128, 4096, 4, 128, True].kernels, answers[96, 4096, 4, 128, True].kernels
    assert aligned["Hopper"] == "Machete"
    assert odd["Hopper"] == "Humming, padded to 256 x 4096"
    for name in set(GPUS) - {"Hopper"}:
        assert aligned[name] == "Marlin"
        assert odd[name] == "Marlin, padded to 128 x 4096"
    # 8 bits with zero points are nothing for Marlin, and no reason to serve a plain matrix
    wide = answers[4096, 96, 8, 32, False].kernels
    assert {wide[name] for name in GPUS} == {"Humming, padded to 4096 x 128"}
    for bits in (2, 3, 5, 6):
        for sym in (True, False):
            few = answers[4096, 96, bits, 32, sym].kernels
            assert {few[name] for name in GPUS} == {"Humming, padded to 4096 x 128"}
            assert few["CPU"] == NO_KERNEL
    # of 96 rows padded to 256, integers take as much as plain values from 6 bits up
    narrow = {bits: answers[96, 4096, bits, 64, False].kernels["Hopper"] for bits in (5, 6)}
    assert narrow == {5: "Humming, padded to 256 x 4096", 6: SMALLER_PLAIN}


@pytest.mark.vllm
def test_our_plugin_holds_in_16_bits_what_padding_would_double() -> None:
    second_factor = use(4096, 16, WeightQuantization(bits=4, group_size=-1))
    [ours] = ask_kernels([second_factor], "bfloat16").uses
    assert {ours.kernels[name] for name in GPUS} == {SMALLER_PLAIN}
    stored = 4096 * (16 // 2 + 2)
    assert {ours.extra_bytes[name] for name in GPUS} == {2 * 4096 * 16 - stored}
    [stock] = ask_kernels([second_factor], "bfloat16", has_plugin=False).uses
    assert stock.kernels["Ampere"] == "Marlin, padded to 4096 x 64"
    assert stock.extra_bytes["Ampere"] == 4096 * (64 // 2 + 2) - stored


@pytest.mark.vllm
def test_stock_vllm_does_not_start_without_a_kernel() -> None:
    few = use(256, 4096, WeightQuantization(bits=3, group_size=64))
    [ours], [stock] = (ask_kernels([few], "bfloat16", has_plugin=plugin).uses for plugin in (True, False))
    assert (ours.kernels["CPU"], stock.kernels["CPU"]) == (NO_KERNEL, DOES_NOT_START)
    assert ours.kernels["Hopper"] == stock.kernels["Hopper"] == "Humming"


@pytest.mark.vllm
def test_padding_and_matrices_without_a_kernel_take_more(answers: dict[tuple[Any, ...], KernelUse]) -> None:
    odd, few = answers[96, 4096, 4, 128, True], answers[96, 4096, 3, 64, False]
    int4_row, int3_row = 4096 // 2 + 2 * 32, (3 * 4096 + 64 * (16 + 3)) // 8
    assert odd.extra_bytes["Hopper"] == (256 - 96) * int4_row
    assert odd.extra_bytes["Ampere"] == (128 - 96) * int4_row
    assert {few.extra_bytes[name] for name in GPUS} == {(256 - 96) * int3_row}
    assert few.extra_bytes["CPU"] == 96 * (2 * 4096 - int3_row)
    assert answers[128, 4096, 4, 128, True].extra_bytes["Ampere"] == 0


@pytest.mark.vllm
def test_this_cpu_is_told_what_it_can_do(answers: dict[tuple[Any, ...], KernelUse]) -> None:
    import torch
    from vllm import _custom_ops  # noqa: F401 - loads the operators
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    from ercsvd_deploy.exporters.vllm.compatibility import kernel_config

    has_operator = hasattr(torch.ops._C, "cpu_gemm_wna16")
    said = set()
    for (rows, columns, bits, group_size, sym), answered in answers.items():
        shape = (rows, columns)
        config = kernel_config(
            shape, shape, bits=bits, group_size=group_size, sym=sym, act_dtype=torch.bfloat16
        )
        takes, _ = CPUWNA16LinearKernel.can_implement(config)
        assert answered.kernels["CPU"] == ("CPUWNA16" if takes and has_operator else NO_KERNEL)
        said.add(answered.kernels["CPU"])
    assert NO_KERNEL in said


@pytest.mark.vllm
def test_rocm_can_be_asked_too() -> None:
    storages = [WeightQuantization(bits=bits, group_size=128, sym=True) for bits in (4, 8)]
    shape = (128, 4096)
    matrices = [{**storage.model_dump(), "shape": shape, "full_shape": shape} for storage in storages]
    question = {"kind": "ROCM", "capability": (9, 4), "dtype": "float16"}
    [[for_int4, for_int8]] = kernel_choice._ask_vllm({"matrices": matrices, "questions": [question]})[
        "answers"
    ]
    assert for_int4["kernel"] == "TritonW4A16LinearKernel"
    assert for_int8["kernel"] == "ExllamaLinearKernel"


@pytest.mark.vllm
def test_a_cpu_without_avx512_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{LIMITED_CPU}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("ERCSVD_TEST_CPU", "avx2")
    answered = ask_kernels([use(128, 4096, PER_CHANNEL_INT4)], "bfloat16")
    assert answered.problem is None
    assert answered.uses[0].kernels["CPU"] == NO_KERNEL
    assert answered.uses[0].kernels["Ampere"] == "Marlin"


def test_plain_matrices_need_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    answered = ask_kernels([use(96, 40, None)], "float16")
    assert (answered.source, answered.problem) == (None, None)
    assert set(answered.uses[0].kernels.values()) == {PLAIN}
    assert set(answered.uses[0].extra_bytes.values()) == {0}


def test_columns_that_agree_are_one() -> None:
    kernels = dict.fromkeys(ACCELERATORS, "Marlin") | {"Hopper": "Machete", "CPU": NO_KERNEL}
    uses = [KernelUse(1, (), 1, 1, 1, 1, "", None, 1, kernels)]
    assert columns_that_agree(uses) == {
        "Hopper": "Hopper",
        "Blackwell, Ada, Ampere, Turing": "Blackwell",
        "CPU": "CPU",
    }
    assert columns_that_agree([use(1, 1, None)]) == {}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: ModelDirectory) -> Path:
    text = Path(__file__).parents[2] / "examples" / "text" / "calibration.txt"
    path = tmp_path / "recipe.yaml"
    described = {
        "model": {"path": str(tiny_model("llama"))},
        "calibration": {"dataset": {"text": str(text)}, "num_samples": 32, "sequence_length": 16},
        "stages": [{"quantize": {"bits": 4, "group_size": 32}}],
        "export": {"path": str(tmp_path / "out")},
    }
    path.write_text(yaml.safe_dump(described))
    return path


def test_without_vllm_the_plan_says_so_and_names_no_kernel(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["plan", str(recipe)])
    assert result.exit_code == 0, result.output
    assert "vLLM is needed to say which kernels multiply them: it is not installed here" in result.stdout
    for name in (*ACCELERATORS, "Marlin", "CPUWNA16"):
        assert name not in result.stdout


@pytest.mark.parametrize("source", ["no.such.module", "this"])
def test_a_failing_child_is_told_and_does_not_fail_the_plan(
    source: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "find_spec", lambda _: object())
    monkeypatch.setattr(kernel_choice, "_SOURCE", source)
    result = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["kernel_problem"].startswith("it gave no answer: ")
    assert "\n" not in plan["kernel_problem"]
    assert not any(each["kernels"] for each in plan["kernels"])


def test_a_child_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "find_spec", lambda _: object())
    monkeypatch.setattr(kernel_choice, "_SOURCE", "sleeper")
    monkeypatch.setattr(kernel_choice, "_TIMEOUT", 0.5)
    answered = ask_kernels([use(128, 128, PER_CHANNEL_INT4)], "bfloat16")
    assert answered.problem == "it gave no answer: it was not ready after 0 seconds"


def test_stacks_and_second_parts_are_counted_as_they_are_allocated() -> None:
    """Low-rank projections and a pivoted one, stored alike, on rank 1 of 2; other rows fill blocks."""
    storage = WeightQuantization(bits=4, group_size=32)
    low_rank = Storage(layout="low_rank", shape=(256, 128), rank=64, factor_a=storage, factor_b=storage)
    pivoted = Storage(
        layout="pivoted", shape=(200, 128), rank=32, pivot_blocks=2, pivot_rows=storage, other_rows=storage
    )
    half, columns = slice(128, 256), slice(0, 128)
    projections = [
        Projection("q", low_rank, half, columns),
        Projection("k", pivoted, slice(100, 200), columns),
        Projection("v", low_rank, half, columns),
    ]
    [stack] = plan_stacks(projections)
    assert stack.matrix.parts == ("q.factor_a", "k.pivot_rows", "v.factor_a")
    assert (stack.matrix.shape, stack.widths) == ((160, 128), (64, 32, 64))
    second, others, _ = [plan_second(projection) for projection in projections]
    assert second is not None
    assert others is not None
    assert (second.shape, second.full_shape) == ((128, 64), (256, 64))
    assert (others.shape, others.full_shape) == ((96, 32), (192, 32))  # 84 rows on each of two ranks


def test_a_correction_is_counted_beside_its_integers() -> None:
    """Two corrected projections whose factors are stored alike, and a dense one, on rank 1 of 2."""
    int3, int8 = WeightQuantization(bits=3, group_size=32), WeightQuantization(bits=8, group_size=32)
    projections = [
        Projection(name, storage, slice(128, 256), slice(0, 128))
        for name, storage in (
            ("q", Storage.corrected((256, 128), int3, 64, int8, int8)),
            ("k", Storage.dense((256, 128), int3)),
            ("v", Storage.corrected((256, 128), int3, 32, int8, int8)),
        )
    ]
    integers, factors = plan_stacks(projections)
    assert integers.matrix.parts == ("q", "k", "v")
    assert (integers.matrix.shape, integers.matrix.full_shape) == ((384, 128), (768, 128))
    assert factors.matrix.parts == ("q.factor_a", "v.factor_a")
    assert (factors.matrix.shape, factors.widths) == ((96, 128), (64, 32))
    second, none, _ = [plan_second(projection) for projection in projections]
    assert none is None
    assert second is not None
    assert (second.shape, second.full_shape) == ((128, 64), (256, 64))


def test_only_the_child_imports_vllm() -> None:
    code = (
        "import sys, ercsvd_deploy.exporters.vllm.kernels.choice\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("missing", "error"),
    [("vllm.kernels.moved", "vLLM has no scalar_types in vllm"), ("triton", "no module triton")],
)
def test_a_moved_name_is_told_from_a_dependency_that_is_missing(
    missing: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is nothing that another release of this package could mend."""
    from ercsvd_deploy.exporters.vllm import compatibility

    def fail(_: str) -> None:
        raise ModuleNotFoundError(f"no module {missing}", name=missing)

    monkeypatch.setitem(compatibility._MODULES, "scalar_types", ("vllm.kernels.moved.scalars",))
    monkeypatch.setattr(compatibility, "import_module", fail)
    with pytest.raises(ImportError, match=error):
        _ = compatibility.scalar_types
