"""Which of vLLM's kernels multiplies each matrix of a plan: vLLM itself is asked, once for all of them.

vLLM takes the first kernel of a list that its platform, the storage and the local shape allow. It is made to
believe in each accelerator in turn, in a process of its own (`kernel_answers`). Where vLLM is not installed
there is no answer. Matrices that no kernel takes are served as plain ones of 16 bits.
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
from ercsvd_deploy.exporters.vllm.layer_plan import PlannedMatrix, Projection, plan_second, plan_stacks
from ercsvd_deploy.format.schema import Storage, WeightQuantization

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import Architecture, LayerLinears

PLAIN = "plain"
NO_KERNEL = "none: served as plain 16-bit"
_SOURCE = "ercsvd_deploy.exporters.vllm.kernels.answers"
_PATIENCE = 300.0  # seconds; importing vLLM takes about ten
_KERNEL_SUFFIX = "LinearKernel"
# name -> what the child is asked about; Turing has no bfloat16
ACCELERATORS: Mapping[str, Mapping[str, Any]] = {
    "Hopper": {"kind": "CUDA", "capability": (9, 0)},
    "Blackwell": {"kind": "CUDA", "capability": (10, 0)},
    "Ada": {"kind": "CUDA", "capability": (8, 9)},
    "Ampere": {"kind": "CUDA", "capability": (8, 0)},
    "Turing": {"kind": "CUDA", "capability": (7, 5), "dtype": "float16"},
    "CPU": {"kind": "CPU", "capability": None},
}


@dataclass(frozen=True)
class KernelUse:
    """A kind of matrix on one rank, and what multiplies it.

    Attributes:
        tensor_parallel_size: On how many devices the model is served.
        matrices: Names within the layer; several are stacked into one.
        rows: Outputs on a rank.
        columns: Inputs on a rank.
        full_rows: Outputs over all ranks.
        full_columns: Inputs over all ranks.
        storage: How it is stored, in words.
        quantization: Bits, group size and symmetry; None for a plain matrix.
        layers: In how many layers; an output layer counts as one.
        kernels: Accelerator -> kernel, "plain" or why there is none; empty if vLLM was not asked.
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


@dataclass(frozen=True)
class KernelAnswers:
    """What vLLM said.

    Attributes:
        uses: The matrices, with their kernels.
        source: vLLM, its release, and whose CPU it spoke of; None if it was not asked.
        problem: Why vLLM has not said it; None if it has.
    """

    uses: tuple[KernelUse, ...]
    source: str | None = None
    problem: str | None = None


def plan_matrices(
    described: Mapping[str, Storage],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> tuple[KernelUse, ...]:
    """Return every kind of decoder matrix, and an output layer of integers, at every tensor parallel size.

    Nobody is asked yet.
    """
    found: dict[tuple[Any, ...], KernelUse] = {}
    for size in sorted(set(tensor_parallel_sizes)):
        matrices = [
            matrix
            for layer in architecture.layers
            for stack in layer.stacks
            for matrix in _matrices(layer, stack, described, architecture, size)
        ]
        for matrix in [*matrices, *_output_layer(described, architecture, size)]:
            key = (size, matrix)
            stored = matrix.quantization
            known = found.get(key) or KernelUse(
                size,
                matrix.parts,
                *matrix.shape,
                *matrix.full_shape,
                _label(stored),
                None if stored is None else stored.model_dump(),
                layers=0,
            )
            found[key] = replace(known, layers=known.layers + 1)
    return tuple(found.values())


def ask_kernels(uses: Sequence[KernelUse], dtype: str) -> KernelAnswers:
    """Ask vLLM about the matrices; a plan of plain ones needs no answer.

    Args:
        uses: From `plan_matrices`.
        dtype: Of the activations; float32 stands for bfloat16, which vLLM serves such checkpoints in.
    """
    packed = list({_asked_about(use): None for use in uses if use.quantization is not None})
    if not packed:
        plain = dict.fromkeys(ACCELERATORS, PLAIN)
        return KernelAnswers(tuple(replace(use, kernels=plain) for use in uses))
    if find_spec("vllm") is None:
        return KernelAnswers(tuple(uses), problem="it is not installed here")
    served = "bfloat16" if dtype == "float32" else dtype
    request = {
        "matrices": [json.loads(matrix) for matrix in packed],
        "questions": [{"dtype": served, **question} for question in ACCELERATORS.values()],
    }
    try:
        reply = _ask_vllm(request)
    except _NoAnswerError as error:
        return KernelAnswers(tuple(uses), problem=f"it gave no answer: {error}")
    chosen: dict[str | None, dict[str, str]] = {None: dict.fromkeys(ACCELERATORS, PLAIN)}
    for index, matrix in enumerate(packed):
        chosen[matrix] = {
            name: _in_words(answers[index])
            for name, answers in zip(ACCELERATORS, reply["answers"], strict=True)
        }
    source = f"vLLM {reply['vllm']}" + (", on a CPU: this one" if reply["is_cpu_build"] else "")
    return KernelAnswers(
        tuple(
            replace(use, kernels=chosen[None if use.quantization is None else _asked_about(use)])
            for use in uses
        ),
        source=source,
    )


def columns_that_agree(uses: Sequence[KernelUse]) -> dict[str, str]:
    """Return heading -> accelerator whose answers stand for all that the heading names."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in ACCELERATORS:
        if all(name in use.kernels for use in uses):
            alike.setdefault(tuple(use.kernels[name] for use in uses), []).append(name)
    return {", ".join(names): names[0] for names in alike.values()}


def without_shape(kernel: str) -> str:
    """Return what a use says of a kernel, less the shape that it pads to."""
    return kernel.split(" to ", maxsplit=1)[0]


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
    seconds = [plan_second(projection) for projection in projections]
    return [stack.matrix for stack in plan_stacks(projections)] + [
        second for second in seconds if second is not None
    ]


def _output_layer(
    described: Mapping[str, Storage], architecture: Architecture, size: int
) -> list[PlannedMatrix]:
    """Return an output layer's own integers on one rank; what it shares with an embedding has no kernel."""
    output_layer = architecture.vocabulary.output_layer
    storage = None if output_layer is None else described.get(output_layer.name)
    if output_layer is None or storage is None:
        return []
    rows, columns = output_layer.out_features, output_layer.in_features
    local = local_shape(output_layer.name, "", rows, columns, architecture, size) or (rows, columns)
    full_shape = (size * local[0], columns)
    return [PlannedMatrix((output_layer.name,), local, full_shape, storage.weight)]


def _share(length: int, parts: int) -> int:
    """Return a rank's share; what vLLM cannot cut evenly it will not serve, whatever is planned here."""
    return length // parts if length % parts == 0 else length


def _label(quantization: WeightQuantization | None) -> str:
    if quantization is None:
        return PLAIN
    size = quantization.group_size
    groups = "one group a row" if size == -1 else f"groups of {size}"
    return f"int{quantization.bits}, {groups}" + ("" if quantization.sym else ", zero points")


def _asked_about(use: KernelUse) -> str:
    assert use.quantization is not None
    question = {
        "shape": (use.rows, use.columns),
        "full_shape": (use.full_rows, use.full_columns),
        **use.quantization,
    }
    return json.dumps(question, sort_keys=True)


def _in_words(answer: Mapping[str, Any]) -> str:
    if answer["kernel"] is None:
        return NO_KERNEL
    name = str(answer["kernel"]).removesuffix(_KERNEL_SUFFIX)
    return name if answer["padded"] is None else "{}, padded to {} x {}".format(name, *answer["padded"])


class _NoAnswerError(RuntimeError):
    """The child gave no answer; the message says why, in one line."""


def _ask_vllm(request: Mapping[str, Any]) -> dict[str, Any]:
    """Let a child ask.

    Raises:
        _NoAnswerError: it failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-kernels-") as directory:
        asked, reply = Path(directory, "request.json"), Path(directory, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(  # noqa: S603 - this interpreter, and files made here
                [sys.executable, "-m", _SOURCE, str(asked), str(reply)],
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _NoAnswerError(f"it was not ready after {_PATIENCE:.0f} seconds") from None
        if done.returncode == 0 and reply.is_file():
            answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
            return answer
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise _NoAnswerError(lines[-1] if lines else f"it ended with status {done.returncode}")
