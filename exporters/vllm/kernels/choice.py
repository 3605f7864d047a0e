"""Which of vLLM's kernels multiplies each matrix, said from shapes alone; no vLLM needed to ask.

vLLM takes the first kernel of a list that its platform, the storage and the local shape allow
(`kernels.linear`, 0.32): on an NVIDIA GPU Machete (Hopper alone), then Marlin; on a CPU WNA16. Plain matrices
go to cuBLAS or oneDNN. Projections that share an input are one layer in vLLM, and their first matrices, where
stored alike, one matrix (`stacked_linear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ercsvd_deploy.exporters.vllm.cutting import BLOCK, local_shape
from ercsvd_deploy.format.schema import ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture, LayerLinears

PLAIN = "plain"
NO_KERNEL = "none"
_MACHETE_INPUTS, _MACHETE_OUTPUTS = 64, 128
_MACHETE_GROUPS = (-1, 64, 128)


@dataclass(frozen=True)
class KernelUse:
    """A kind of matrix on one rank, and what multiplies it.

    Attributes:
        tensor_parallel_size: On how many GPUs the model is served.
        matrices: Names within the layer; several are stacked into one.
        rows: Outputs on a rank.
        columns: Inputs on a rank.
        storage: "plain", or bits, group size and symmetry.
        hopper: Kernel on a Hopper GPU.
        other_gpu: Kernel on other NVIDIA GPUs, from Turing on.
        cpu: Kernel on a CPU.
        layers: In how many layers.
    """

    tensor_parallel_size: int
    matrices: tuple[str, ...]
    rows: int
    columns: int
    storage: str
    hopper: str
    other_gpu: str
    cpu: str
    layers: int


def choose_kernels(
    described: Mapping[str, ModuleDescription],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> tuple[KernelUse, ...]:
    """Return every kind of decoder matrix at every tensor parallel size, with its kernels."""
    found: dict[KernelUse, int] = {}
    for size in sorted(set(tensor_parallel_sizes)):
        for layer in architecture.layers:
            for names, rows, columns, storage in _matrices(layer, described, architecture, size):
                use = KernelUse(
                    size,
                    names,
                    rows,
                    columns,
                    _label(storage),
                    hopper_kernel(rows, columns, storage),
                    gpu_kernel(storage),
                    cpu_kernel(rows, columns, storage),
                    0,
                )
                found[use] = found.get(use, 0) + 1
    return tuple(replace(use, layers=layers) for use, layers in found.items())


def hopper_kernel(rows: int, columns: int, storage: WeightQuantization | None) -> str:
    """Return the kernel for a matrix [rows, columns] on a Hopper GPU."""
    if storage is None:
        return "cuBLAS"
    is_aligned = columns % _MACHETE_INPUTS == 0 and rows % _MACHETE_OUTPUTS == 0
    if is_aligned and storage.group_size in _MACHETE_GROUPS:
        return "Machete"
    return gpu_kernel(storage)


def gpu_kernel(storage: WeightQuantization | None) -> str:
    """Return the kernel on other NVIDIA GPUs; Marlin pads what does not fill its tiles."""
    if storage is None:
        return "cuBLAS"
    return "Marlin" if storage.sym or storage.bits == 4 else NO_KERNEL


def cpu_kernel(rows: int, columns: int, storage: WeightQuantization | None) -> str:
    """Return the kernel for a matrix [rows, columns] on a CPU."""
    if storage is None:
        return "oneDNN"
    return "CPUWNA16" if storage.bits == 4 and rows % BLOCK == columns % BLOCK == 0 else NO_KERNEL


def _matrices(
    layer: LayerLinears, described: Mapping[str, ModuleDescription], architecture: Architecture, size: int
) -> Iterable[tuple[tuple[str, ...], int, int, WeightQuantization | None]]:
    """Yield names, rows, columns and storage of every matrix of a layer on one rank."""
    for group in layer.groups:
        stacks: dict[WeightQuantization | None, list[tuple[str, int, int]]] = {}
        seconds = []
        for linear in group:
            shape = (linear.out_features, linear.in_features)
            description = described.get(linear.name) or ModuleDescription(layout="dense", shape=shape)
            for position, (part, ((rows, columns), storage)) in enumerate(description.parts.items()):
                local = local_shape(linear.name, part, rows, columns, architecture, size) or (rows, columns)
                name = layer.local_name(linear) + (f".{part}" if part else "")
                if position == 0:
                    stacks.setdefault(storage, []).append((name, *local))
                else:
                    seconds.append(((name,), *local, storage))
        for storage, members in stacks.items():
            rows = sum(rows for _, rows, _ in members)
            yield tuple(name for name, _, _ in members), rows, members[0][2], storage
        yield from seconds


def _label(storage: WeightQuantization | None) -> str:
    if storage is None:
        return PLAIN
    groups = "one group a row" if storage.group_size == -1 else f"groups of {storage.group_size}"
    return f"int{storage.bits}, {groups}" + ("" if storage.sym else ", zero points")
