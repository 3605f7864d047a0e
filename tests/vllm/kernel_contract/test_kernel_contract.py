"""Every matrix that is written, in every kernel of vLLM's CUDA list, at every compute capability; no GPU.

One child process runs all cases (see the package); the tests look at its answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.kernel_contract.recipe_matrices import RECIPES, REPOSITORY, integer_matrices
from tests.vllm.kernel_contract.small_layers import NUM_STORAGES

pytestmark = pytest.mark.vllm

# where `make setup` installs what the CUDA builds of vLLM bring along and its CPU builds must not see
GPU_KERNELS = Path(os.environ.get("ERCSVD_GPU_KERNELS", Path(sys.prefix) / "gpu-kernels"))
CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
NEEDS_OTHER_ACTIVATIONS = {"CutlassW4A8LinearKernel"}  # of 8 bits
SHOWN = 10


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Answers of the child: a case each."""
    folder = tmp_path_factory.mktemp("kernel-contract")
    is_installed = find_spec("humming") is not None
    if not is_installed and not (GPU_KERNELS / "humming").is_dir():
        pytest.fail(f"humming-kernels is not in {GPU_KERNELS}: run `make setup`")
    matrices: dict[str, str] = {}
    for recipe in RECIPES:
        for use in integer_matrices(recipe, TENSOR_PARALLEL_SIZES, folder):
            matrix = {
                "shape": (use.rows, use.columns),
                "full_shape": (use.full_rows, use.full_columns),
                "quantization": use.quantization,
            }
            matrices.setdefault(json.dumps(matrix), recipe)
    request = {
        "gpu_kernels": None if is_installed else str(GPU_KERNELS),
        "recipe_matrices": [{**json.loads(matrix), "recipe": recipe} for matrix, recipe in matrices.items()],
    }
    asked, reply = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.kernel_contract.child", str(asked), str(reply)],
        cwd=REPOSITORY,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answered: list[dict[str, Any]] = json.loads(reply.read_text(encoding="utf-8"))["cases"]
    return answered


def described(case: dict[str, Any]) -> str:
    """Name a case and say what went wrong."""
    rank, size = case["rank"]
    capability = ".".join(map(str, case["capability"]))
    forced = f", {case['forced']} alone" if case["forced"] else ""
    return (
        f"{case['layer']}, {case['storage']}, {case['dtype']}, rank {rank} of {size}, capability {capability}"
        f"{forced} ({', '.join(case['kernels']) or 'no kernel'}): {case['error']}"
    )


def assert_none_failed(cases: list[dict[str, Any]]) -> None:
    failed = [described(case) for case in cases if case["error"]]
    shown = "\n".join(failed[:SHOWN])
    assert not failed, f"{len(failed)} of {len(cases)} cases failed, such as\n{shown}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_chosen_kernels_multiply_what_is_stored(
    capability: tuple[int, int], cases: list[dict[str, Any]]
) -> None:
    chosen = [c for c in cases if c["group"] == "chosen" and tuple(c["capability"]) == capability]
    assert len(chosen) > 900
    assert all(case["kernels"] for case in chosen)
    for some in (chosen, [case for case in chosen if case["multiplied"]]):
        assert {case["rank"][1] for case in some} == set(TENSOR_PARALLEL_SIZES)
        assert {case["layer"].split()[1] for case in some} == {"low_rank", "dense", "pivoted", "mixed"}
        assert len({case["storage"] for case in some}) == NUM_STORAGES
    assert_none_failed(chosen)


def test_every_layer_is_multiplied_by_every_class_that_is_chosen_for_it(cases: list[dict[str, Any]]) -> None:
    chosen = [case for case in cases if case["group"] == "chosen"]

    def layers(some: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        keys = ("layer", "storage", "dtype")
        return {(*(case[key] for key in keys), *case["rank"], *case["kernels"]) for case in some}

    assert layers([case for case in chosen if case["multiplied"]]) == layers(chosen)
    assert all(case["multiplied"] for case in chosen if "HummingLinearKernel" in case["kernels"])


def test_every_class_of_the_cuda_list_multiplies_what_it_takes(cases: list[dict[str, Any]]) -> None:
    forced = [case for case in cases if case["group"] == "forced"]
    assert_none_failed(forced)
    used = {case["forced"]: 0 for case in forced}
    for case in forced:
        if not case["refused"]:
            used[case["forced"]] += 1
            assert case["kernels"] == [case["forced"]], described(case)
    assert {name for name, count in used.items() if count == 0} == NEEDS_OTHER_ACTIVATIONS
    assert {"MacheteLinearKernel", "MarlinLinearKernel", "HummingLinearKernel"} <= used.keys()


def test_hopper_is_served_by_humming_where_machete_refuses(cases: list[dict[str, Any]]) -> None:
    by_kernel: dict[str, set[tuple[int, ...]]] = {}
    for case in cases:
        if case["group"] != "damaged" and not case["forced"]:
            for kernel in case["kernels"]:
                by_kernel.setdefault(kernel, set()).add(tuple(case["capability"]))
    assert by_kernel["MacheteLinearKernel"] == {(9, 0)}
    assert by_kernel["HummingLinearKernel"] == set(CAPABILITIES)  # 8 bits with zero points, elsewhere
    for case in cases:
        if case["group"] == "chosen" and case["storage"].startswith(("int2", "int3", "int5", "int6")):
            assert "HummingLinearKernel" in case["kernels"], described(case)
    assert (9, 0) not in by_kernel["MarlinLinearKernel"]


def test_factors_that_kernels_would_pad_to_more_than_16_bits_take_16_bits(
    cases: list[dict[str, Any]],
) -> None:
    corrected = [case for case in cases if case["group"] == "corrected"]
    assert_none_failed(corrected)
    assert {tuple(case["capability"]) for case in corrected if case["multiplied"]} == set(CAPABILITIES)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_matrices_of_every_recipe_have_kernels(
    capability: tuple[int, int], cases: list[dict[str, Any]]
) -> None:
    recipe = [c for c in cases if c["group"] == "recipe" and tuple(c["capability"]) == capability]
    assert len(recipe) > 1000
    assert all(case["kernels"] for case in recipe)
    assert_none_failed(recipe)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_stock_vllm_multiplies_the_formats_of_others(
    capability: tuple[int, int], cases: list[dict[str, Any]]
) -> None:
    stock = [c for c in cases if c["group"] == "stock" and tuple(c["capability"]) == capability]
    assert Counter(case["layer"] for case in stock) == {"auto-round": 6, "compressed-tensors": 3}
    assert all(case["multiplied"] for case in stock if not case["error"])
    assert_none_failed(stock)


def test_wrongly_loaded_layers_are_noticed(cases: list[dict[str, Any]]) -> None:
    damaged = [case for case in cases if case["group"] == "damaged"]
    assert len(damaged) > 50
    assert [described(case) for case in damaged if "off by" not in case["error"]] == []
