"""The description of a checkpoint of dense integers in AutoRound's format, which stock vLLM reads.

vLLM serves it at all of our bits, mixed from matrix to matrix, on NVIDIA GPUs: 4 and 8 by Marlin, the others
by Humming (vllm/model_executor/layers/quantization/inc, read at 0.32). The tensors have GPTQ's layout, which
is ours transposed (`files.gptq_store`). No torch here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ercsvd_deploy.format.storage import WEIGHT_SHAPE, WORD_BITS, Storage, WeightQuantization

_PACKING = "auto_round:auto_gptq"
_BITS_WITH_ONE_SCALE_A_ROW = (4, 8)  # Marlin's; Humming's schema of GPTQ divides by the group size


def why_unreadable(storage: Storage, *, is_embedding: bool, is_output_layer: bool) -> str | None:
    """Return why vLLM cannot read a matrix in this format, to be put behind its name; None if it can."""
    if is_embedding or is_output_layer:
        return "is outside the layers: this format leaves the vocabulary as it is"
    if storage.layout != "dense":
        return f"is {storage.label}: the format has no low-rank matrices"
    return None if storage.weight is None else next(_problems(storage.weight, *storage.shape), None)


def _problems(integers: WeightQuantization, rows: int, columns: int) -> Iterator[str]:
    """Yield the reasons why integers of a matrix [rows, columns] cannot be read."""
    bits = integers.bits
    if not integers.sym:
        yield "is asymmetric: vLLM reads symmetric integers of this format"
    if integers.group_size == -1 and bits not in _BITS_WITH_ONE_SCALE_A_ROW:
        yield f"has one scale a row: vLLM reads this format's {bits} bits in groups of columns"
    for count, side in ((rows, "rows"), (columns, "columns")):
        if count * bits % WORD_BITS:
            yield f"has {count} {side}: in {bits} bits they fill no whole {WORD_BITS}-bit words"


def bytes_beyond(storage: Storage) -> int:
    """Return the bytes that a matrix has in this format beyond those of this project's tensors.

    It has zero points, of symmetric integers too, as many bits each as the integers; and no shape.
    """
    if storage.weight is None:
        return 0
    rows, columns = storage.shape
    shape = storage.weight.leaf_shapes(rows, columns)[WEIGHT_SHAPE]
    return storage.weight.num_groups(columns) * rows * storage.weight.bits // 8 - 8 * math.prod(shape)


def describe(modules: Mapping[str, Storage], plain: Collection[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    Args:
        modules: Checkpoint name of every changed Linear -> its storage; all of them readable.
        plain: Checkpoint names of the layers' other modules with matrices.
    """
    integers = {name: storage.weight for name, storage in modules.items() if storage.weight is not None}
    [(usual, _)] = Counter(integers.values()).most_common(1)
    others = {name: _scheme(each) for name, each in integers.items() if each != usual}
    others |= {name: {"bits": 16, "data_type": "float"} for name in plain}
    return {
        "quant_method": "auto-round",
        "packing_format": _PACKING,
        **_scheme(usual),
        "block_name_to_quantize": ",".join(sorted({_block(name) for name in modules})),
        **({"extra_config": others} if others else {}),
    }


def _scheme(integers: WeightQuantization) -> dict[str, Any]:
    return {
        "bits": integers.bits,
        "group_size": integers.group_size,
        "sym": integers.sym,
        "data_type": "int",
    }


def _block(name: str) -> str:
    """Return the name of the list of layers that a module is in, such as `model.layers`."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:number])
