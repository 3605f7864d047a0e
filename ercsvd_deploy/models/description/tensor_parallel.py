"""Which side of a Linear tensor parallelism cuts, by the Linear's name.

A plan does not need vLLM, so it uses the names that transformers' decoders have in common. Serving uses
vLLM's own layer; tests compare the two for every family.
"""

from __future__ import annotations

from dataclasses import dataclass

# Last Linears of an attention or an MLP: their inputs are divided among ranks, their outputs are summed.
_ENDS_OF_ATTENTION = frozenset({"o_proj", "out_proj", "dense", "wo", "c_proj"})
_ENDS_OF_MLP = frozenset({"down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "c_proj", "linear_2"})
_KEY_VALUES = frozenset({"k_proj", "v_proj"})
# Several projections that transformers has as one Linear.
_FUSED_ATTENTION = frozenset({"qkv_proj", "query_key_value", "Wqkv", "wqkv"})
_FUSED_DELTA_NET = frozenset({"in_proj_qkv"})  # queries, keys and values of a linear attention
_SORTED_WHEN_LOADED = frozenset({"query_key_value"})  # in files queries, keys and values alternate by head
_FUSED_GATE = frozenset({"gate_up_proj"})


@dataclass(frozen=True)
class OutputBlock:
    """A block of a Linear's outputs: each rank gets an equal part of every block."""

    size: int
    is_key_value: bool = False  # repeated, not cut, if there are fewer key-value heads than ranks


def cuts_inputs(name: str) -> bool:
    """Whether tensor parallelism cuts a Linear along its inputs (vLLM: row-parallel)."""
    return _leaf(name) in _ENDS_OF_ATTENTION | _ENDS_OF_MLP


def holds_key_values(name: str) -> bool:
    """Whether all outputs of a Linear are keys or values."""
    return _leaf(name) in _KEY_VALUES


def is_sorted_when_loaded(name: str) -> bool:
    """Whether vLLM changes the order of a Linear's outputs when it loads them."""
    return _leaf(name) in _SORTED_WHEN_LOADED


def output_blocks(
    name: str, out_features: int, num_heads: int, num_key_value_heads: int, linear_key_size: int = 0
) -> tuple[OutputBlock, ...]:
    """Return the blocks of outputs of a decoder's column-parallel Linear, in vLLM's order.

    Args:
        name: Name of the Linear.
        out_features: Number of its outputs.
        num_heads: Number of query heads of the decoder's attention.
        num_key_value_heads: Number of its key-value heads.
        linear_key_size: Number of outputs of all keys of a linear attention layer; all queries have as many.
    """
    leaf = _leaf(name)
    if leaf in _FUSED_DELTA_NET:
        keys = OutputBlock(linear_key_size)
        return (keys, keys, OutputBlock(out_features - 2 * linear_key_size))
    if leaf in _FUSED_ATTENTION:
        head_size = out_features // (num_heads + 2 * num_key_value_heads)
        key_values = OutputBlock(num_key_value_heads * head_size, is_key_value=True)
        return (OutputBlock(num_heads * head_size), key_values, key_values)
    if leaf in _FUSED_GATE:
        return (OutputBlock(out_features // 2), OutputBlock(out_features // 2))
    return (OutputBlock(out_features, is_key_value=leaf in _KEY_VALUES),)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
