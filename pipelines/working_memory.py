"""What one step of the work holds at its worst moment, in bytes, counted from the code that does it.

Every function stands for a function elsewhere and lists the tensors alive there at once. `n` is a Linear's
inputs, `m` its outputs; 8 bytes are a float64, 4 a float32.
"""

from __future__ import annotations

from ercsvd_deploy.layerwise import MAX_LOGITS_AT_ONCE
from ercsvd_deploy.pipelines.workload import Sequences, Workload
from ercsvd_deploy.rank import LinearShape

_DOUBLE, _SINGLE = 8, 4
# LAPACK's syevd wants 2 n^2 values beside the matrix that becomes the vectors.
_EIGH_MATRICES = 3


def layer_pass(work: Workload, sequences: Sequences, *, observed: bool = False) -> int:
    """A batch on its way through a decoder layer (`LayerwiseModel.advance`), its input and output aside.

    Attention scores are never in memory: sdpa computes them block by block. The MLP holds what goes into it,
    the normalized copy, gate, up and their product; attention holds queries, keys and values with the rotated
    copies, and what comes out.

    Args:
        work: The workload.
        sequences: What passes.
        observed: Whether inputs are added to Grams on the way, which needs their absolute values.
    """
    layer = work.largest_layer
    queries, keys = layer.groups[0][0].out_features, layer.groups[0][1].out_features
    inner = layer.groups[-1][0].in_features
    is_gated = len(layer.groups[-2]) > 1
    attention = 2 * work.hidden + max(4 * queries + 2 * keys, 4 * queries + keys)
    mlp = 2 * work.hidden + (3 if is_gated else 2) * inner
    observing = work.hidden + 2 * inner if observed else 0
    return sequences.batch_tokens * work.computed * max(attention, mlp, observing)


def layer_load(work: Workload) -> int:
    """A layer as it is read (`LayerwiseModel._load`): the stored tensors beside those in compute precision."""
    return work.layer_parameters * (work.computed + (work.stored if work.stored != work.computed else 0))


def grams(work: Workload) -> int:
    """The Grams of a layer's inputs, one for each group of Linears."""
    return sum(_SINGLE * group[0].in_features ** 2 for group in work.largest_layer.groups)


def decomposition(linear: LinearShape, max_rank: int, *, with_metric: bool = False) -> int:
    """What stays of a decomposed Linear: basis, spectrum, and the projection if there is an output metric."""
    smaller = min(linear.out_features, linear.in_features)
    return _DOUBLE * (linear.out_features * max_rank * (2 if with_metric else 1) + smaller)


def decomposing(linear: LinearShape, max_rank: int, *, with_metric: bool = False) -> int:
    """`factorize.decompose` of one Linear, its result included."""
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    rows = m * n if m > n else 0  # the orthogonal factor of a tall weight
    wide = smaller * n
    qr = 3 * m * n if m > n else 0  # weight, its factorized copy, the orthogonal factor
    metric = 2 * smaller**2 if with_metric else 0
    applying = rows + 2 * wide + n * n + metric  # product with the Gram in float64
    # The product, its transpose's sum, and then eigh: argument, vectors and LAPACK's workspace.
    solving = rows + 2 * wide + 2 * smaller**2 + _EIGH_MATRICES * smaller**2 + metric
    result = rows + wide + smaller**2 + 2 * m * max_rank
    return _DOUBLE * max(qr, applying, solving, result)


def truncating(linear: LinearShape, rank: int, *, exact_residual: bool) -> int:
    """`factorize.truncate` with a residual stage, and `to_pivoted` of its result."""
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    residual = 3 * m * n
    if exact_residual:
        residual = max(residual, 2 * m * n + (2 + _EIGH_MATRICES) * smaller**2)
    return _DOUBLE * (residual + 2 * rank * (m + n))


def measuring(linear: LinearShape) -> int:
    """`factorize.calibration_error`: weight, error and their products with the Gram, all in float64."""
    m, n = linear.out_features, linear.in_features
    return _DOUBLE * (4 * m * n + n * n)


def rounding(rows: int, columns: int) -> int:
    """`gptq.quantize_better` of one matrix: normalised Hessian, ordered copy, its inverse; copies of it."""
    normalising = (2 * _DOUBLE + _SINGLE) * columns**2
    solving = 5 * _SINGLE * columns**2 + 5 * _SINGLE * rows * columns
    return max(normalising, solving)


def quantizing(linear: LinearShape, rank: int | None) -> int:
    """`gptq.quantize_factors` of one Linear, or `quantize_better` of a dense one."""
    m, n = linear.out_features, linear.in_features
    if rank is None:
        return max(rounding(m, n), 5 * _SINGLE * m * n)
    held = 2 * _SINGLE * m * n + 2 * _DOUBLE * rank * (m + n)  # original weight, product, factors
    # The re-fit in float64: weight, residual, a product of theirs, the Gram.
    refitting = _DOUBLE * (3 * m * n + n * n)
    judging = 4 * _SINGLE * m * n
    return held + max(rounding(rank, n), rounding(m, rank), refitting, judging)


def logits(work: Workload, sequences: Sequences) -> int:
    """A part of the logits at the end of a pass (`LayerwiseModel._parts`)."""
    vocabulary = work.architecture.vocab_size
    rows = max(1, MAX_LOGITS_AT_ONCE // (vocabulary * sequences.length))
    return min(rows, sequences.batch_rows) * sequences.length * vocabulary * _SINGLE
