"""Warnings about how a planned model will be served; none of them stops a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.cutting import BLOCK, find_unaligned
from ercsvd_deploy.exporters.vllm.experts.fused_kinds import serving_notes as expert_notes
from ercsvd_deploy.format.schema import WORD_BITS, Storage, WeightQuantization
from ercsvd_deploy.pipelines.stages.quantize.planning.vocabulary import describe_tied

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlan


def serving_warnings(
    plan: QuantizePlan,
    described: Mapping[str, Storage],
    architecture: Architecture,
    tensor_parallel_sizes: Sequence[int],
    dtype: str,
    *,
    has_plugin: bool = True,
    bits_on_offer: Iterable[int] = (),
    groups_are_chosen: bool = False,
) -> list[str]:
    """Return warnings about a quantized model that is served differently from what its recipe suggests.

    Args:
        plan: The plan of the quantize stage.
        described: Name -> final storage of every changed Linear.
        architecture: The model's architecture.
        tensor_parallel_sizes: The sizes at which it will be served.
        dtype: Name of the dtype of unquantized tensors, such as "bfloat16".
        has_plugin: Whether our plugin serves the model; it dequantizes matrices that no kernel multiplies.
        bits_on_offer: Bits of which a target chooses.
        groups_are_chosen: Whether a target chooses group sizes; those of the stage then tell nothing.
    """
    multiplied = _multiplied(described, architecture)
    integers = [
        quantization
        for storage in multiplied.values()
        for _, quantization in storage.parts.values()
        if quantization
    ]
    warnings = []
    if not groups_are_chosen:
        ranks = {name: storage.truncated_rank for name, storage in described.items()}
        by_the_stage = plan.describe(ranks, architecture) | plan.describe_experts(architecture)
        experts = {linear.name for linear in architecture.expert_linears}
        warnings += _fitting_notes(plan, by_the_stage, tensor_parallel_sizes, experts)
    warnings += expert_notes(described, architecture) if has_plugin else []
    warnings += describe_tied(described, architecture)
    without_cpu_kernel = sorted({*(quantization.bits for quantization in integers), *bits_on_offer} - {4})
    if without_cpu_kernel:
        kinds = ", ".join(f"{bits}-bit" for bits in without_cpu_kernel)
        without = "it would hold these matrices in 16 bits" if has_plugin else "it would not start there"
        warnings.append(f"quantize: vLLM has no kernel for {kinds} weights on a CPU; {without}")
    unaligned = find_unaligned(multiplied, architecture, tensor_parallel_sizes)
    if unaligned:
        example = unaligned[0]
        warnings.append(
            f"quantize: {len(unaligned)} integer matrices have rows or columns on a GPU that are no "
            f"multiple of {BLOCK} ({example.name} is {example.rows} x {example.columns} at tensor parallel "
            f"size {example.tensor_parallel_size}, say): GPU kernels pad them; where no kernel takes them, "
            "as on a CPU, they are served as plain ones"
        )
    if integers and dtype == "float32":
        warnings.append(
            "quantize: vLLM's integer kernels compute in 16 bits; served in float32 the matrices take 32. "
            "Start vLLM with --dtype float16 or bfloat16"
        )
    return warnings


def _multiplied(described: Mapping[str, Storage], architecture: Architecture) -> dict[str, Storage]:
    """Return the storages that kernels multiply, without the embedding (see `describe_tied`)."""
    embedding = architecture.vocabulary.embedding
    return {
        name: storage for name, storage in described.items() if embedding is None or name != embedding.name
    }


def gpu_warnings(
    dense: Mapping[int, int], candidates: Sequence[Mapping[int, int]], *, is_quantized: bool
) -> list[str]:
    """Return a warning with the sizes at which a GPU holds more bytes than with the dense model.

    Args:
        dense: Tensor parallel size -> bytes of the dense model's weights on each GPU.
        candidates: For every candidate: tensor parallel size -> bytes of its weights on each GPU.
        is_quantized: Whether the recipe quantizes.
    """
    heavier = []
    for size, num_bytes in dense.items():
        shares = [on_gpu[size] / num_bytes for on_gpu in candidates]
        least, most = f"{min(shares):.2f}", f"{max(shares):.2f}"
        if max(shares) > 1:
            heavier.append(f"{size} ({most if least == most else f'{least} to {most}'} times)")
    if not heavier:
        return []
    lighter = [size for size in dense if max(on_gpu[size] / dense[size] for on_gpu in candidates) <= 1]
    smaller = f"tensor parallel size {max(lighter)}" if lighter else "a smaller size"
    return [
        "serving: each GPU holds more bytes of weights than of the dense model at tensor parallel size "
        f"{', '.join(heavier)}, because every GPU has one of two factors whole: serve copies of the model "
        f"at {smaller}, {'' if is_quantized else 'add a quantize stage, '}or remove more parameters"
    ]


def _fitting_notes(
    plan: QuantizePlan,
    described: Mapping[str, Storage],
    tensor_parallel_sizes: Sequence[int],
    experts: Set[str],
) -> list[str]:
    """Return notes on the matrices whose groups differ from the recipe's, with the reason.

    Args:
        plan: The plan of the quantize stage.
        described: Name -> storage by the stage alone.
        tensor_parallel_sizes: The sizes at which the model will be served.
        experts: Names of the Linears of routed experts.
    """
    changed: dict[tuple[WeightQuantization, WeightQuantization | None], list[str]] = {}
    for name, planned in plan.integers.items():
        if planned is None:
            continue
        parts = described[name].parts if name in described else {"": (None, None)}
        for part, (_, integers) in parts.items():
            if integers != planned and not (part and name in plan.corrections):
                changed.setdefault((planned, integers), []).append(f"{name}.{part}" if part else name)
    sizes = ", ".join(map(str, tensor_parallel_sizes))
    notes = []
    for (planned, integers), names in changed.items():
        which = f"{len(names)} matrices ({names[0]}, say)"
        whose = "their columns"
        if not experts.isdisjoint(names):
            whose += ", or those of other matrices of the same experts,"
        if integers is None:
            notes.append(
                f"quantize: {which} stay plain: columns on a GPU, or the rank, are no whole {WORD_BITS}-bit "
                f"words at tensor parallel sizes {sizes}"
            )
            continue
        groups = "one scale a row, which may cost accuracy"
        if integers.group_size != -1:
            groups = f"groups of {integers.group_size}"
        notes.append(
            f"quantize: {which} get {groups}: groups of {planned.group_size} do not divide {whose} on "
            f"a rank at tensor parallel sizes {sizes}"
        )
    return notes
