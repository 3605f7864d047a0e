# No `from __future__ import annotations`, and the schema is written out: `torch.library` reads real types.
"""The operator of a layer with low-rank projections: `torch.ops.ercsvd.lowrank_linear`.

One GEMM applies the first matrices of all projections, which read the same input and are stacked by rows. One
more GEMM per low-rank projection applies its second factor and writes into its slice of the output, so that
nothing is concatenated. The first matrix of a pivoted projection gives outputs too: then the results of both
matrices are written side by side, and one gather puts all outputs of the layer in order. The layer is one
opaque node for torch.compile and CUDA graphs.

The linear method calls it where weights stay plain matrices, above all on CUDA. vLLM's CPU backend repacks
every weight for its own GEMM, which is much faster there; the linear method then calls that GEMM instead.

The operator is defined in a library fragment of our own: a call costs 3 us more than the plain Python
function, against 19 us for `torch.library.custom_op`. The definition lives as long as the `Library` object,
hence the module constant. vLLM is not needed.
"""

import torch
from torch.library import Library

# torch.library is untyped, hence the ignores
_LIBRARY = Library("ercsvd", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "lowrank_linear(Tensor x, Tensor first, Tensor?[] seconds, int[] widths, Tensor? bias, "
    "Tensor? order=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def lowrank_linear(
    x: torch.Tensor,
    first: torch.Tensor,
    seconds: list[torch.Tensor | None],
    widths: list[int],
    bias: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply several projections, each dense, low-rank or pivoted, to one input.

    Args:
        x: [..., in], any strides.
        first: [sum(widths), in], the stacked first matrices: a dense projection's weight, a low-rank one's
            `factor_a`, a pivoted one's `pivot_rows`.
        seconds: one per projection: `factor_b` [out_i, widths[i]] or `other_rows`; None for a dense one.
        widths: rows of each projection in `first`: its rank, or its out-dimension if dense.
        bias: [out] or None.
        order: [out], index of every output in the results of the first matrices followed by those of the
            second ones; needed if a projection is pivoted.

    Returns:
        [..., out], the projections' outputs side by side, contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    if order is not None:
        output = _in_order(rows, first, seconds, widths, order)
        output = output if bias is None else output.add_(bias)
        return output.view(*x.shape[:-1], output.shape[-1])
    hidden = torch.mm(rows, first.t())
    output = x.new_empty((rows.shape[0], _output_width(seconds, widths)))
    hidden_start = output_start = 0
    for second, width in zip(seconds, widths, strict=True):
        part = hidden[:, hidden_start : hidden_start + width]
        hidden_start += width
        out_features = width if second is None else second.shape[0]
        target = output[:, output_start : output_start + out_features]
        shift = None if bias is None else bias[output_start : output_start + out_features]
        output_start += out_features
        if second is None:
            target.copy_(part if shift is None else part + shift)
        elif shift is None:
            torch.mm(part, second.t(), out=target)
        else:
            torch.addmm(shift, part, second.t(), out=target)
    return output.view(*x.shape[:-1], output.shape[-1])


def _in_order(
    rows: torch.Tensor,
    first: torch.Tensor,
    seconds: list[torch.Tensor | None],
    widths: list[int],
    order: torch.Tensor,
) -> torch.Tensor:
    hidden_width = first.shape[0]
    second_width = sum(second.shape[0] for second in seconds if second is not None)
    results = rows.new_empty((rows.shape[0], hidden_width + second_width))
    hidden = results[:, :hidden_width]
    torch.mm(rows, first.t(), out=hidden)
    hidden_start, start = 0, hidden_width
    for second, width in zip(seconds, widths, strict=True):
        part = hidden[:, hidden_start : hidden_start + width]
        hidden_start += width
        if second is not None:
            torch.mm(part, second.t(), out=results[:, start : start + second.shape[0]])
            start += second.shape[0]
    return results.index_select(1, order)


def _lowrank_linear_fake(
    x: torch.Tensor,
    first: torch.Tensor,  # noqa: ARG001 - the operator's signature
    seconds: list[torch.Tensor | None],
    widths: list[int],
    bias: torch.Tensor | None = None,  # noqa: ARG001 - the operator's signature
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    width = _output_width(seconds, widths) if order is None else order.shape[0]
    return x.new_empty((*x.shape[:-1], width))


def _output_width(seconds: list[torch.Tensor | None], widths: list[int]) -> int:
    return sum(
        width if second is None else second.shape[0] for second, width in zip(seconds, widths, strict=True)
    )


_LIBRARY.impl("lowrank_linear", lowrank_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY._register_fake("lowrank_linear", _lowrank_linear_fake)  # type: ignore[no-untyped-call]
