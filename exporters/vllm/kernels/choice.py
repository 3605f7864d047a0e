"""Ask vLLM which of its kernels multiplies each matrix of a plan, once for all matrices.

vLLM takes the first kernel of a list that supports its platform, the storage and the local shape. A separate
process stubs one accelerator after the other (`kernels.answers`). Without vLLM there is no answer. Matrices
without a kernel are served as plain ones of 16 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.exporters.vllm.cutting import local_shape
from ercsvd_deploy.exporters.vllm.kernels.padding import integer_bytes, is_smaller_plain, plain_bytes
from ercsvd_deploy.exporters.vllm.layers.layer_plan import PlannedMatrix, Projection, plan_matrices_of
from ercsvd_deploy.format.schema import Storage, WeightQuantization

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import Architecture, LayerLinears

PLAIN = "plain"
NO_KERNEL = "none: served as plain 16-bit"
SMALLER_PLAIN = "plain 16-bit: smaller"  # than what the kernel pads
DOES_NOT_START = "none: does not start"
_SOURCE = "ercsvd_deploy.exporters.vllm.kernels.answers"
_TIMEOUT = 300.0  # seconds; importing vLLM takes about ten
_KERNEL_SUFFIX = "LinearKernel"
CPU = "CPU"
# name -> question for the child process; Turing has no bfloat16
ACCELERATORS: Mapping[str, Mapping[str, Any]] = {
    "Hopper": {"kind": "CUDA", "capability": (9, 0)},
    "Blackwell": {"kind": "CUDA", "capability": (10, 0)},
    "Ada": {"kind": "CUDA", "capability": (8, 9)},
    "Ampere": {"kind": "CUDA", "capability": (8, 0)},
    "Turing": {"kind": "CUDA", "capability": (7, 5), "dtype": "float16"},
    CPU: {"kind": "CPU", "capability": None},
}


@dataclass(frozen=True)
class KernelUse:
    """A kind of matrix on one rank, and the kernels that multiply it.

    Attributes:
        tensor_parallel_size: Number of devices that serve the model.
        matrices: Names within the layer of the matrices, which are stacked into one.
        rows: Number of outputs on a rank.
        columns: Number of inputs on a rank.
        full_rows: Number of outputs over all ranks.
        full_columns: Number of inputs over all ranks.
        storage: Description of its storage, such as "int4, groups of 128".
        quantization: Bits, group size and symmetry; None for a plain matrix.
        layers: Number of layers with such a matrix; an output layer counts as one.
        kernels: Accelerator -> kernel, or why there is none; empty if vLLM was not asked.
        extra_bytes: Accelerator -> bytes that a device holds of one such matrix beyond the stored ones: its
            kernel's padding, or those of 16-bit values.
    """

    tensor_parallel_size: int
    matrices: tuple[str, ...]
    rows: int
    columns: int
    full_rows: int
    full_columns: int
    storage: str
    quantization: Mapping[str, Any] | None
    layers: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    extra_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelAnswers:
    """vLLM's answers about the matrices of a plan.

    Attributes:
        uses: The matrices with their kernels.
        source: vLLM's release, and whether "CPU" means this machine's; None if vLLM was not asked.
        problem: Why there is no answer; None if there is one.
    """

    uses: tuple[KernelUse, ...]
    source: str | None = None
    problem: str | None = None


def plan_matrices(
    described: Mapping[str, Storage],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> tuple[KernelUse, ...]:
    """Return every kind of decoder matrix, and an integer output layer, at every tensor parallel size.

    The kernels are not filled in.
    """
    uses: dict[tuple[Any, ...], KernelUse] = {}
    kinds = _kinds_of_layers(described, architecture)
    for size in sorted(set(tensor_parallel_sizes)):
        matrices = [
            (matrix, number)
            for layer, number in kinds
            for stack in layer.stacks
            for matrix in _matrices(layer, stack, described, architecture, size)
        ]
        matrices += [(matrix, 1) for matrix in _output_layer(described, architecture, size)]
        for matrix, number in matrices:
            key = (size, matrix)
            quantization = matrix.quantization
            use = uses.get(key) or KernelUse(
                size,
                matrix.parts,
                *matrix.shape,
                *matrix.full_shape,
                _label(quantization),
                None if quantization is None else quantization.model_dump(),
                layers=0,
            )
            uses[key] = replace(use, layers=use.layers + number)
    return tuple(uses.values())


def ask_kernels(uses: Sequence[KernelUse], dtype: str, *, has_plugin: bool = True) -> KernelAnswers:
    """Return vLLM's answers about the matrices; it is not asked if all are plain.

    Args:
        uses: The matrices, see `plan_matrices`.
        dtype: Dtype of the activations; vLLM serves float32 checkpoints in bfloat16.
        has_plugin: Whether our plugin serves the model, which holds in 16 bits what no kernel takes, or what
            takes no more so; stock vLLM does not start without a kernel.
    """
    packed_matrices = list({_question_about(use): None for use in uses if use.quantization is not None})
    if not packed_matrices:
        return KernelAnswers(tuple(map(_plain, uses)))
    if find_spec("vllm") is None:
        return KernelAnswers(tuple(uses), problem="it is not installed here")
    served_dtype = "bfloat16" if dtype == "float32" else dtype
    request = {
        "matrices": [json.loads(matrix) for matrix in packed_matrices],
        "questions": [{"dtype": served_dtype, **question} for question in ACCELERATORS.values()],
    }
    try:
        reply = _ask_vllm(request)
    except _NoAnswerError as error:
        return KernelAnswers(tuple(uses), problem=f"it gave no answer: {error}")
    answers_by_matrix = {
        matrix: {name: answers[index] for name, answers in zip(ACCELERATORS, reply["answers"], strict=True)}
        for index, matrix in enumerate(packed_matrices)
    }
    source = f"vLLM {reply['vllm']}" + (", on a CPU: this one" if reply["is_cpu_build"] else "")
    answered = (_answered(use, answers_by_matrix, has_plugin=has_plugin) for use in uses)
    return KernelAnswers(tuple(answered), source=source)


def _answered(
    use: KernelUse, answers_by_matrix: Mapping[str, Mapping[str, Mapping[str, Any]]], *, has_plugin: bool
) -> KernelUse:
    """Return a use with the kernel of each accelerator, and what each holds beyond the stored bytes."""
    if use.quantization is None:
        return _plain(use)
    told = {
        accelerator: _describe(use, answer, has_plugin=has_plugin)
        for accelerator, answer in answers_by_matrix[_question_about(use)].items()
    }
    return replace(
        use,
        kernels={accelerator: kernel for accelerator, (kernel, _) in told.items()},
        extra_bytes={accelerator: extra_bytes for accelerator, (_, extra_bytes) in told.items()},
    )


def _plain(use: KernelUse) -> KernelUse:
    return replace(
        use, kernels=dict.fromkeys(ACCELERATORS, PLAIN), extra_bytes=dict.fromkeys(ACCELERATORS, 0)
    )


def _describe(use: KernelUse, answer: Mapping[str, Any], *, has_plugin: bool) -> tuple[str, int]:
    """Return an accelerator's kernel for an integer matrix, and the bytes that it holds beyond the stored."""
    quantization = WeightQuantization.model_validate(use.quantization)
    shape = (use.rows, use.columns)
    stored, in_half = integer_bytes(shape, quantization), plain_bytes(shape)
    if answer["kernel"] is None:
        return (NO_KERNEL, in_half - stored) if has_plugin else (DOES_NOT_START, 0)
    rows, columns = answer["padded"] or shape
    if has_plugin and is_smaller_plain(shape, (rows, columns), quantization):
        return SMALLER_PLAIN, in_half - stored
    name = str(answer["kernel"]).removesuffix(_KERNEL_SUFFIX)
    told = name if answer["padded"] is None else f"{name}, padded to {rows} x {columns}"
    return told, integer_bytes((rows, columns), quantization) - stored


def columns_that_agree(uses: Sequence[KernelUse]) -> dict[str, str]:
    """Return column heading -> one of the accelerators in the heading, whose answers are all equal."""
    names_by_kernels: dict[tuple[str, ...], list[str]] = {}
    for name in ACCELERATORS:
        if all(name in use.kernels for use in uses):
            names_by_kernels.setdefault(tuple(use.kernels[name] for use in uses), []).append(name)
    return {", ".join(names): names[0] for names in names_by_kernels.values()}


def without_shape(kernel: str) -> str:
    """Return a kernel's description without the shape that it pads to."""
    return kernel.split(" to ", maxsplit=1)[0]


def _kinds_of_layers(
    described: Mapping[str, Storage], architecture: Architecture
) -> list[tuple[LayerLinears, int]]:
    """Return a layer of every kind, and how many there are: layers of a kind have the same matrices."""
    kinds: dict[tuple[Any, ...], list[LayerLinears]] = {}
    for layer in architecture.layers:
        stacks = (
            tuple(
                (layer.local_name(each), each.out_features, each.in_features, described.get(each.name))
                for each in stack
            )
            for stack in layer.stacks
        )
        kinds.setdefault((architecture.key_value_heads_of(f"{layer.prefix}."), *stacks), []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def _matrices(
    layer: LayerLinears,
    stack: Sequence[LinearShape],
    described: Mapping[str, Storage],
    architecture: Architecture,
    size: int,
) -> list[PlannedMatrix]:
    """Return the matrices of one of vLLM's layers on one rank, named within the layer."""
    projections = []
    for linear in stack:
        rows, columns = linear.out_features, linear.in_features
        description = described.get(linear.name) or Storage(layout="dense", shape=(rows, columns))
        if architecture.is_row_parallel(linear.name):
            columns = _share(columns, size)
        else:
            rows = architecture.outputs_on_rank(linear.name, rows, size) or rows
        name = layer.local_name(linear)
        projections.append(Projection(name, description, slice(0, rows), slice(0, columns)))
    return plan_matrices_of(projections)


def _output_layer(
    described: Mapping[str, Storage], architecture: Architecture, size: int
) -> list[PlannedMatrix]:
    """Return an output layer's integer matrix on one rank; one tied to the embedding has no kernel."""
    output_layer = architecture.vocabulary.output_layer
    storage = None if output_layer is None else described.get(output_layer.name)
    if output_layer is None or storage is None:
        return []
    rows, columns = output_layer.out_features, output_layer.in_features
    local = local_shape(output_layer.name, "", rows, columns, architecture, size) or (rows, columns)
    full_shape = (size * local[0], columns)
    return [PlannedMatrix((output_layer.name,), local, full_shape, storage.weight)]


def _share(length: int, parts: int) -> int:
    """Return a rank's part of a length; the whole length if vLLM cannot cut it evenly."""
    return length // parts if length % parts == 0 else length


def _label(quantization: WeightQuantization | None) -> str:
    if quantization is None:
        return PLAIN
    group_size = quantization.group_size
    groups = "one group a row" if group_size == -1 else f"groups of {group_size}"
    return f"int{quantization.bits}, {groups}" + ("" if quantization.sym else ", zero points")


def _question_about(use: KernelUse) -> str:
    assert use.quantization is not None
    question = {
        "shape": (use.rows, use.columns),
        "full_shape": (use.full_rows, use.full_columns),
        **use.quantization,
    }
    return json.dumps(question, sort_keys=True)


class _NoAnswerError(RuntimeError):
    """The child process gave no answer; the message says why in one line."""


def _ask_vllm(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of the child process to a request.

    Raises:
        _NoAnswerError: the process failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-kernels-") as directory:
        request_file, answer_file = Path(directory, "request.json"), Path(directory, "answer.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        try:
            process = subprocess.run(  # noqa: S603 - this interpreter, and files made here
                [sys.executable, "-m", _SOURCE, str(request_file), str(answer_file)],
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _NoAnswerError(f"it was not ready after {_TIMEOUT:.0f} seconds") from None
        if process.returncode == 0 and answer_file.is_file():
            answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
            return answer
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        raise _NoAnswerError(lines[-1] if lines else f"it ended with status {process.returncode}")
