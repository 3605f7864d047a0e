"""Loads, finalizes and multiplies layers under a stubbed platform: `python -m ... REQUEST ANSWER`.

REQUEST is a JSON file {"gpu_kernels": where humming-kernels is installed or null, "recipe_matrices":
[{"recipe", "shape", "full_shape", "quantization"}, ...]}; ANSWER receives {"vllm": its version, "cases": one
object for every case that was run}.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.vllm.kernel_contract import humming_operators

CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
_PLAYED = [CAPABILITIES[0]]
_TOLERANCE = 0.02  # of the largest output: factors' products are rounded to 16 bits in between


@dataclass
class Case:
    """One layer on one rank under one accelerator, and what became of it.

    Attributes:
        group: "chosen" by vLLM, "forced" to one kernel class, or "damaged" on
            the way to it, "recipe": a recipe's shapes, without numbers,
            "corrected": layers with factors of small rank, or "stock": vLLM's
            own Linear.
        layer: kinds of Linears, layout and ranks.
        storage: bits, group size and symmetry.
        rank: tensor-parallel rank and size.
        capability: CUDA's.
        dtype: of the activations.
        forced: the only kernel class that vLLM may choose.
        damaged: the leaf that is loaded wrongly, by which the case must fail.
        kernels: classes that were chosen for the layer's integer matrices.
        multiplied: whether they were given numbers, too.
        refused: vLLM has no kernel; only where one class is forced.
        error: why the case failed; empty if it passed.
    """

    group: str
    layer: str
    storage: str
    rank: tuple[int, int]
    capability: tuple[int, int]
    dtype: str
    forced: str = ""
    damaged: str = ""
    kernels: tuple[str, ...] = ()
    multiplied: bool = False
    refused: bool = False
    error: str = ""


def main() -> None:
    """Answer one request."""
    request, answer = (Path(argument) for argument in sys.argv[1:3])
    asked = json.loads(request.read_text(encoding="utf-8"))
    os.environ["ERCSVD_REQUIRE_KERNELS"] = "1"
    folder = asked["gpu_kernels"]
    humming_operators.prepare(Path(folder) if folder else None, lambda: _PLAYED[0])
    runner = Runner()
    cases = [
        *runner.small_layers(),
        *runner.damaged_layers(),
        *runner.recipe_matrices(asked["recipe_matrices"]),
        *runner.corrections(),
        *runner.stock_layers(),
    ]
    told = {"vllm": runner.release, "cases": [asdict(case) for case in cases]}
    answer.write_text(json.dumps(told), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # nothing of a misled vLLM is worth an orderly end


class Runner:
    """Runs cases one after the other; vLLM is imported once."""

    def __init__(self) -> None:
        import vllm
        from vllm.model_executor import parameter
        from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS

        # What asks for operators when it is imported is imported without an accelerator.
        from vllm.model_executor.layers.quantization import auto_gptq, humming  # noqa: F401
        from vllm.model_executor.layers.quantization.inc.schemes import (  # noqa: F401
            inc_fp8_scheme,
            inc_mxfp4_scheme,
            inc_mxfp8_scheme,
            inc_wna16_linear,
        )
        from vllm.model_executor.layers.quantization.online import fp8  # noqa: F401
        from vllm.platforms import PlatformEnum

        from ercsvd_deploy.exporters.vllm.kernels.stubbed_platform import Accelerator, StubbedPlatform
        from tests.vllm.kernel_contract import cuda_operators

        torch.set_num_threads(1)
        self._platform = StubbedPlatform()
        self._classes = {kernel.__name__: kernel for kernel in _POSSIBLE_KERNELS[PlatformEnum.CUDA]}
        # no process group exists: parameters note a rank that nothing here reads
        parameter.get_tensor_model_parallel_rank = lambda: 0
        parameter.get_tensor_model_parallel_world_size = lambda: 1
        cuda_operators.install()
        humming_operators.install()
        self.release: str = vllm.__version__
        self._accelerator = Accelerator
        self._stored: dict[Any, Any] = {}
        self._handed_over: set[Any] = set()
        self._multiplied: set[Any] = set()

    def small_layers(self) -> Iterator[Case]:
        """Run every layout, storage, rank and capability; which of them with numbers, `_is_due` says."""
        from tests.vllm.kernel_contract.small_layers import small_layers

        for small, turn in itertools.product(small_layers(TENSOR_PARALLEL_SIZES), range(len(CAPABILITIES))):
            capability = CAPABILITIES[(small.number + turn) % len(CAPABILITIES)]
            # Turing has no bfloat16; elsewhere cases take turns
            dtype = "float16" if capability == (7, 5) or small.number % 2 else "bfloat16"
            case = Case("chosen", small.name, small.storage_name, small.rank, capability, dtype)
            yield self._run(case, partial(self._load_and_multiply, case, small))
            # how a class arranges tensors depends on nothing but the matrix
            if capability == (9, 0) and small.number % 3 == 0:
                for name in self._classes:
                    forced = replace(case, group="forced", forced=name, kernels=(), error="")
                    yield self._run(forced, partial(self._load_and_multiply, forced, small))

    def damaged_layers(self) -> Iterator[Case]:
        """Run layers that are loaded wrongly: what the kernels multiply must then be wrong."""
        from tests.vllm.kernel_contract.small_layers import small_layers

        unpadded = (small for small in small_layers((1,)) if small.name == "qkv low_rank")
        leaves = ("weight_packed", "weight_scale", "weight_zero_point")
        for small, capability, leaf in itertools.product(unpadded, ((8, 0), (9, 0)), leaves):
            if leaf != "weight_zero_point" or small.storage_name.endswith("asym"):
                case = Case("damaged", small.name, small.storage_name, small.rank, capability, "bfloat16")
                case.damaged = leaf
                yield self._run(case, partial(self._load_and_multiply, case, small))

    def recipe_matrices(self, matrices: list[dict[str, Any]]) -> Iterator[Case]:
        """Run the matrices of recipes as shapes: at every capability, once for every class that is chosen."""
        for matrix, capability in itertools.product(matrices, CAPABILITIES):
            storage = matrix["quantization"]
            case = Case(
                "recipe",
                f"{matrix['recipe']} {matrix['shape']} of {matrix['full_shape']}",
                f"int{storage['bits']} groups {storage['group_size']} {'sym' if storage['sym'] else 'asym'}",
                (0, 1),
                capability,
                "float16" if capability == (7, 5) else "bfloat16",
            )
            yield self._run(case, partial(self._hand_over, case, matrix))

    def stock_layers(self) -> Iterator[Case]:
        """Run vLLM's own Linear on exports in the formats of others, at all bits that they hold."""
        from tests.vllm.kernel_contract.stock_layers import CASES

        for (name, bits), capability in itertools.product(CASES, CAPABILITIES):
            dtype = "float16" if capability == (7, 5) else "bfloat16"
            case = Case("stock", name, f"int{bits} groups 64 sym", (0, 1), capability, dtype)
            yield self._run(case, partial(self._multiply_stock, case, name, bits))

    def corrections(self) -> Iterator[Case]:
        """Run layers with factors of small rank, which are held as the plugin decides."""
        from tests.vllm.kernel_contract.small_layers import small_corrections

        for small, capability in itertools.product(small_corrections(), CAPABILITIES):
            dtype = "float16" if capability == (7, 5) else "bfloat16"
            case = Case("corrected", small.name, small.storage_name, small.rank, capability, dtype)
            yield self._run(case, partial(self._load_and_multiply, case, small))

    def _multiply_stock(self, case: Case, name: str, bits: int) -> None:
        from tests.vllm.kernel_contract.stock_layers import quantized_weight, stock_linear

        dtype = getattr(torch, case.dtype)
        weight = quantized_weight(bits, dtype)
        linear = stock_linear(name, weight, dtype)
        case.kernels = (type(linear.quant_method).__name__,)
        x = torch.randn(3, linear.input_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            product = linear.quant_method.apply(linear, x).double()
        case.multiplied = True
        expected = x.double() @ weight.dequantize(dtype).double().T
        difference = (product - expected).abs().max() / expected.abs().max()
        assert difference <= _TOLERANCE, f"off by {difference:.1%} of the largest output"

    def _run(self, case: Case, work: Callable[[], None]) -> Case:
        self._platform.become(self._accelerator("CUDA", case.capability))
        _PLAYED[0] = case.capability
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join(
            name for name in self._classes if case.forced and name != case.forced
        )
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the case has failed
            case.error = _describe(error)
        return case

    def _hand_over(self, case: Case, matrix: dict[str, Any]) -> None:
        from ercsvd_deploy.exporters.vllm.compatibility import padded_shape
        from ercsvd_deploy.exporters.vllm.kernels.padding import integer_bytes
        from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord
        from ercsvd_deploy.exporters.vllm.layers.packed_matrix import PackedMatrix
        from ercsvd_deploy.format.schema import WeightQuantization

        shape, full_shape = tuple(matrix["shape"]), tuple(matrix["full_shape"])
        storage = WeightQuantization.model_validate(matrix["quantization"])
        dtype = getattr(torch, case.dtype)
        with torch.device("meta"):
            packed = PackedMatrix(case.layer, shape, full_shape, storage, dtype, KernelRecord())
            case.kernels = (type(packed._kernel).__name__,)
            is_tuned = case.kernels == ("HummingLinearKernel",)  # its tiles depend on the capability
            key = (shape, full_shape, storage, dtype, case.kernels, is_tuned and case.capability)
            if key in self._handed_over:
                return
            self._handed_over.add(key)
            packed._convert_for_kernel()  # `finalize` leaves matrices without storage alone
            product = packed(torch.empty(3, shape[1], dtype=dtype))
        assert product.shape == (3, shape[0]), f"{product.shape} is not {(3, shape[0])}"
        told = padded_shape(case.kernels[0], shape, storage.group_size)
        assert _padded_to(packed, storage.bits, shape) == told, f"`plan` says that it is padded to {told}"
        held = sum(tensor.nbytes for tensor in itertools.chain(packed.parameters(), packed.buffers()))
        assert held == integer_bytes(told, storage), f"it holds {held} bytes"

    def _takes(self, case: Case, projections: list[Any], dtype: torch.dtype) -> bool:
        """Whether the one class that may be chosen says that it takes every integer matrix of the layer."""
        from ercsvd_deploy.exporters.vllm.compatibility import kernel_config
        from ercsvd_deploy.exporters.vllm.layers.layer_plan import plan_matrices_of

        kernel = self._classes[case.forced]
        configs = [
            kernel_config(
                matrix.shape, matrix.full_shape, **matrix.quantization.model_dump(), act_dtype=dtype
            )
            for matrix in plan_matrices_of(projections)
            if matrix.quantization is not None
        ]
        least = kernel.get_min_capability()
        has_capability = 10 * case.capability[0] + case.capability[1] >= least
        return has_capability and all(kernel.can_implement(config)[0] for config in configs)

    def _is_due(self, case: Case, small: Any) -> bool:
        """Whether a layer is given numbers here.

        Kernels arrange and multiply a matrix alike at every capability, so once is enough, at the first that
        comes. Humming does not, and is given them at all.
        """
        is_arranged_anew = "HummingLinearKernel" in case.kernels
        key = (small.number, case.dtype, case.kernels, is_arranged_anew and case.capability)
        is_first = key not in self._multiplied
        self._multiplied.add(key)
        return is_first

    def _load_and_multiply(self, case: Case, small: Any) -> None:
        from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord
        from ercsvd_deploy.exporters.vllm.layers.layer import StackedLinear
        from ercsvd_deploy.exporters.vllm.layers.layer_plan import Projection
        from ercsvd_deploy.exporters.vllm.layers.packed_matrix import PackedMatrix
        from tests.vllm.kernel_contract.layers import StoredLayer

        dtype = getattr(torch, case.dtype)
        key = (small.layer, small.descriptions, dtype, small.least)
        if key not in self._stored:
            self._stored[key] = StoredLayer(small.layer, small.descriptions, dtype, small.least)
        stored = self._stored[key]
        projections = [
            Projection(linear.name, description, *small.layer.block(index, *small.rank))
            for index, (linear, description) in enumerate(
                zip(small.layer.linears, small.descriptions, strict=True)
            )
        ]
        if case.forced and not self._takes(case, projections, dtype):
            case.refused = True
            return
        stacked = StackedLinear(projections, dtype, KernelRecord(), allow_op=False)
        if case.group != "corrected":
            for matrix in stacked.matrices:
                if isinstance(matrix, PackedMatrix):
                    matrix._is_smaller_plain = False  # kernels are the subject, whatever they pad
        case.kernels = tuple(
            sorted(
                {type(matrix._kernel).__name__ for matrix in stacked.matrices if hasattr(matrix, "_kernel")}
            )
        )
        if case.group == "chosen" and not self._is_due(case, small):
            return
        case.multiplied = True
        for loader, tensors in zip(stacked.loaders, stored.tensors, strict=True):
            for leaf, tensor in tensors.items():
                loader.load(leaf, _damage(tensor) if case.damaged in leaf.split(".") else tensor)
            assert not loader.problems(), loader.problems()
        stacked.finalize()
        if case.group == "corrected":
            _check_held(projections, stacked.matrices, dtype)
        columns = projections[0].columns
        x = torch.randn(3, columns.stop - columns.start, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            product = stacked(x, None).double()
        expected = stored.product(x, *small.rank)
        assert product.shape == expected.shape, f"{product.shape} is not {expected.shape}"
        difference = (product - expected).abs().max() / expected.abs().max()
        assert difference <= _TOLERANCE, f"off by {difference:.1%} of the largest output"


def _check_held(projections: list[Any], matrices: Any, dtype: torch.dtype) -> None:
    """Check that every matrix takes what `plan` says: padded integers, or 16 bits if that is no more."""
    from ercsvd_deploy.exporters.vllm.compatibility import (
        choose_mp_linear_kernel,
        kernel_config,
        padded_shape,
    )
    from ercsvd_deploy.exporters.vllm.kernels.padding import integer_bytes
    from ercsvd_deploy.exporters.vllm.layers.layer_plan import plan_matrices_of

    for matrix, held in zip(plan_matrices_of(projections), matrices, strict=True):
        storage, (rows, columns) = matrix.quantization, matrix.shape
        assert storage is not None
        config = kernel_config(matrix.shape, matrix.full_shape, **storage.model_dump(), act_dtype=dtype)
        kernel = choose_mp_linear_kernel(config).__name__
        padded = padded_shape(kernel, matrix.shape, storage.group_size)
        expected = min(integer_bytes(padded, storage), 2 * rows * columns)
        num_bytes = sum(tensor.nbytes for tensor in itertools.chain(held.parameters(), held.buffers()))
        assert num_bytes == expected, f"{matrix.name} takes {num_bytes} bytes, and {expected} are enough"


def _padded_to(packed: Any, bits: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape that a kernel has in fact filled a matrix up to."""
    name = type(packed._kernel).__name__
    if name == "HummingLinearKernel":
        return packed._kernel.layer_config.shape_n, packed._kernel.layer_config.shape_k
    if name == "MarlinLinearKernel":  # tiles of 16 columns
        tiles, words = packed.weight_packed.shape
        return words * 32 // bits // 16, tiles * 16
    return shape


def _damage(tensor: torch.Tensor) -> torch.Tensor:
    """Move every row to the next one's place: rows of outputs, or of the words that zero points share."""
    return tensor.roll(1, dims=0)


def _describe(error: Exception) -> str:
    """Say what went wrong and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-5:-1])
    return f"{type(error).__name__}: {error} ({where})"


if __name__ == "__main__":
    main()
