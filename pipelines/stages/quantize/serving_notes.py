"""What about serving a plan people should know before it runs: nothing here stops a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ercsvd_deploy.exporters.vllm.cutting import BLOCK, WORD_BITS, find_unaligned
from ercsvd_deploy.format.schema import ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.pipelines.stages.quantize.storage import QuantizePlan


def serving_warnings(
    plan: QuantizePlan,
    described: Mapping[str, ModuleDescription],
    architecture: Architecture,
    tensor_parallel_sizes: Sequence[int],
    dtype: str,
) -> list[str]:
    """Return what about a quantized model is served otherwise than its recipe may suggest.

    Args:
        plan: How the recipe stores every matrix.
        described: What every altered Linear becomes.
        architecture: The model's.
        tensor_parallel_sizes: At which it is to be served.
        dtype: Precision of the other tensors, "bfloat16" say.
    """
    storages = [storage for each in described.values() for _, storage in each.parts.values() if storage]
    warnings = _fitting_notes(plan, described, tensor_parallel_sizes)
    if any(storage.bits == 8 or not storage.sym for storage in storages):
        warnings.append(
            "quantize: vLLM's CPU build has no kernel for 8-bit integers or zero points; on a CPU such "
            "matrices are served as plain ones, in the memory that those take"
        )
    unaligned = find_unaligned(described, architecture, tensor_parallel_sizes)
    if unaligned:
        first = unaligned[0]
        warnings.append(
            f"quantize: {len(unaligned)} integer matrices have rows or columns on a rank that are no "
            f"multiple of {BLOCK} ({first.name} is {first.rows} x {first.columns} at tensor parallel size "
            f"{first.tensor_parallel_size}, say): GPU kernels pad them; where no kernel takes them, as on a "
            "CPU, they are served as plain ones"
        )
    if storages and dtype == "float32":
        warnings.append(
            "quantize: integer kernels compute in 16 bits; serve with --dtype float16 or bfloat16, or the "
            "matrices are served as plain ones"
        )
    return warnings


def gpu_warnings(
    dense: Mapping[int, int], candidates: Mapping[int, Mapping[int, int]], *, is_quantized: bool
) -> list[str]:
    """Return a line for every tensor parallel size at which a GPU would hold more than of the dense model.

    Args:
        dense: Tensor parallel size -> bytes of the dense model's weights on each GPU.
        candidates: Number of compressed layers -> the same of the compressed model.
        is_quantized: Whether the recipe quantizes.
    """
    shares = {
        size: {k: on_gpu[size] / num_bytes for k, on_gpu in candidates.items()}
        for size, num_bytes in dense.items()
    }
    worth = [size for size, by_k in shares.items() if max(by_k.values()) <= 1]
    fewer = f"serve on {max(worth)} or fewer, as several copies of the model," if worth else "serve on one"
    remedy = fewer + ("" if is_quantized else ", add a quantize stage,") + " or remove more parameters"
    warnings = []
    for size, by_k in shares.items():
        least, most = min(by_k.values()), max(by_k.values())
        if most <= 1:
            continue
        times = f"{most:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"{least:.2f} to {most:.2f}"
        warnings.append(
            f"serving: at tensor parallel size {size} each GPU holds {times} times the bytes that it would "
            f"hold of the dense model, because every GPU has one of the two factors whole: {remedy}"
        )
    return warnings


def _fitting_notes(
    plan: QuantizePlan, described: Mapping[str, ModuleDescription], tensor_parallel_sizes: Sequence[int]
) -> list[str]:
    """Say which matrices got other groups than the recipe names, and why."""
    changed: dict[tuple[WeightQuantization, WeightQuantization | None], list[str]] = {}
    for name, wanted in plan.storage.items():
        if wanted is None:
            continue
        parts = described[name].parts if name in described else {"": (None, None)}
        for part, (_, storage) in parts.items():
            if storage != wanted:
                changed.setdefault((wanted, storage), []).append(f"{name}.{part}" if part else name)
    sizes = ", ".join(map(str, tensor_parallel_sizes))
    notes = []
    for (wanted, storage), names in changed.items():
        which = f"{len(names)} matrices ({names[0]}, say)"
        if storage is None:
            notes.append(
                f"quantize: {which} stay plain: their columns on a rank are no whole {WORD_BITS}-bit words "
                f"at tensor parallel sizes {sizes}"
            )
            continue
        groups = "one scale a row, which may cost accuracy"
        if storage.group_size != -1:
            groups = f"groups of {storage.group_size}"
        notes.append(
            f"quantize: {which} get {groups}: groups of {wanted.group_size} do not divide their columns on a "
            f"rank at tensor parallel sizes {sizes}"
        )
    return notes
