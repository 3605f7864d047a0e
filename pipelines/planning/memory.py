"""What one step of the work holds at its worst moment, counted from the code that does it.

Every function stands for a function elsewhere and lists the tensors alive there at once. `n` is a Linear's
inputs, `m` its outputs.

glibc maps blocks of 32 MiB and more on their own and gives them back when they are freed. Smaller ones lie in
the heap, which hardly ever shrinks. So the two are counted apart (`Held`): what a process is left with is the
heap at its highest so far, and the large blocks alive now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.streaming import MAX_LOGITS_AT_ONCE
from ercsvd_deploy.pipelines.stages.workload import Sequences, Workload

_DOUBLE, _SINGLE = 8, 4  # bytes of a float64 and a float32
_LARGEST_IN_HEAP = 32 * 2**20
_EIGH_MATRICES = 3  # LAPACK's syevd wants 2 n^2 values beside the matrix that becomes the vectors
_LOSSES = 4  # matrices that `gptq.proxy_loss` holds


@dataclass(frozen=True)
class Held:
    """Bytes alive at once.

    Attributes:
        mapped: In blocks that go back to the system when they are freed.
        heap: In smaller ones.
    """

    mapped: int = 0
    heap: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.mapped + self.heap

    def __add__(self, other: Held) -> Held:
        return Held(self.mapped + other.mapped, self.heap + other.heap)


def blocks(values: int, element: int, count: int = 1) -> Held:
    """Return `count` tensors of so many values of so many bytes."""
    size = values * element
    return Held(size * count) if size >= _LARGEST_IN_HEAP else Held(0, size * count)


def highest(*moments: Held) -> Held:
    """Return what a process has to have for moments that follow each other."""
    return Held(max(each.mapped for each in moments), max(each.heap for each in moments))


def states(work: Workload, sequences: Sequences | None, count: int = 1) -> Held:
    """Activations of all sequences between two layers, in batches; `count` times."""
    if sequences is None:
        return Held()
    values = sequences.batch_tokens * work.hidden
    exact = sequences.tokens * work.hidden * work.computed * count
    return Held(exact) if blocks(values, work.computed).mapped else Held(0, exact)


def layer_pass(work: Workload, sequences: Sequences, *, observed: bool = False) -> Held:
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

    def each(width: int, count: int) -> Held:
        return blocks(sequences.batch_tokens * width, work.computed, count)

    attention = each(work.hidden, 2) + each(queries, 4) + each(keys, 2)
    mlp = each(work.hidden, 2) + each(inner, 3 if is_gated else 2)
    observing = each(work.hidden, 1) + each(inner, 2) if observed else Held()
    return highest(attention, mlp, observing)


def layer_weights(work: Workload) -> Held:
    """A loaded layer."""
    return _sum(blocks(linear.parameters, work.computed) for linear in work.largest_layer.linears)


def layer_matrices(work: Workload, described: Mapping[str, Storage]) -> Held:
    """The matrices of the compressed layer that has most of them, in float32."""
    layers = [
        [
            rows * columns
            for linear in layer.linears
            if linear.name in described
            for (rows, columns), _ in described[linear.name].parts.values()
        ]
        for layer in work.architecture.layers
    ]
    return _sum(blocks(values, _SINGLE) for values in max(layers, key=sum))


def layer_load(work: Workload) -> Held:
    """A layer as it is read (`LayerwiseModel._load`): stored tensors beside those in compute precision."""
    if work.stored == work.computed:
        return layer_weights(work)
    stored = _sum(blocks(linear.parameters, work.stored) for linear in work.largest_layer.linears)
    return layer_weights(work) + stored


def grams(work: Workload) -> Held:
    """The Grams of a layer's inputs, one for each group of Linears."""
    return _sum(blocks(group[0].in_features ** 2, _SINGLE) for group in work.largest_layer.groups)


def output_metrics(work: Workload) -> Held:
    """The Fisher information of a layer's outputs, one for each Linear."""
    return _sum(blocks(linear.out_features**2, _SINGLE) for linear in work.largest_layer.linears)


def decomposition(linear: LinearShape, max_rank: int, *, with_metric: bool = False) -> Held:
    """What stays of a decomposed Linear: basis, spectrum, and the projection if there is an output metric."""
    smaller = min(linear.out_features, linear.in_features)
    basis = blocks(linear.out_features * max_rank, _DOUBLE, 2 if with_metric else 1)
    return basis + blocks(smaller, _DOUBLE)


def decomposing(linear: LinearShape, max_rank: int, *, with_metric: bool = False) -> Held:
    """`factorize.decompose` of one Linear, its result included."""
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    is_tall = m > n
    weight, square = blocks(m * n, _DOUBLE), blocks(smaller**2, _DOUBLE)
    wide = blocks(smaller * n, _DOUBLE)
    rows = weight if is_tall else Held()  # the orthogonal factor of a tall weight
    metric = square + square if with_metric else Held()
    qr = weight + weight + weight if is_tall else Held()  # weight, its factorized copy, the orthogonal factor
    applying = rows + wide + wide + blocks(n * n, _DOUBLE) + metric  # product with the Gram in float64
    # The product, its sum with its transpose, and then eigh: argument, vectors and LAPACK's workspace.
    solving = rows + wide + wide + square + square + blocks(2 * smaller**2, _DOUBLE) + square + metric
    result = rows + wide + square + blocks(m * max_rank, _DOUBLE, 2)
    return highest(qr, applying, solving, result)


def truncating(linear: LinearShape, rank: int, *, exact_residual: bool) -> Held:
    """`factorize.truncate` with a residual stage, and `to_pivoted` of its result."""
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    weight, square = blocks(m * n, _DOUBLE), blocks(smaller**2, _DOUBLE)
    factors = blocks(rank * m, _DOUBLE, 2) + blocks(rank * n, _DOUBLE, 2)
    residual = weight + weight + weight
    if exact_residual:
        solving = weight + weight + square + square + blocks(2 * smaller**2, _DOUBLE) + square
        residual = highest(residual, solving)
    return residual + factors


def measuring(linear: LinearShape) -> Held:
    """`factorize.calibration_error`: weight, error and their products with the Gram, all in float64."""
    m, n = linear.out_features, linear.in_features
    return blocks(m * n, _DOUBLE, 4) + blocks(n * n, _DOUBLE)


def compensating(linear: LinearShape) -> Held:
    """`factorize.compensated_weight`, and `compensated_error` of what comes of it, all in float64."""
    m, n = linear.out_features, linear.in_features
    # Gram, ridge, a sum of theirs, the factor; weight, what is wanted, what is solved for.
    solving = blocks(n * n, _DOUBLE, 4) + blocks(m * n, _DOUBLE, 3)
    judging = blocks(n * n, _DOUBLE) + blocks(m * n, _DOUBLE, 4)
    return highest(solving, judging)


def rounding(rows: int, columns: int) -> Held:
    """`gptq.quantize_together`: the Gram ordered and factored, the loop, the losses."""
    factoring = blocks(columns**2, _DOUBLE, 3)
    solving = blocks(columns**2, _SINGLE) + blocks(rows * columns, _SINGLE, 5)
    judging = blocks(columns**2, _SINGLE) + blocks(rows * columns, _SINGLE, 2 + _LOSSES)
    return highest(factoring + blocks(rows * columns, _SINGLE), solving, judging)


def quantizing(linears: Sequence[LinearShape], ranks: Mapping[str, int | None]) -> Held:
    """GPTQ of Linears with the same inputs: their weights or first factors at once, then pair by pair."""
    held, moments, stacked = Held(), [], 0
    for linear in linears:
        m, n, rank = linear.out_features, linear.in_features, ranks.get(linear.name)
        stacked += rank or m
        if rank is None:
            continue
        held += blocks(m * n, _SINGLE) + blocks(rank * m, _DOUBLE, 2) + blocks(rank * n, _DOUBLE, 2)
        # The re-fit in float64: weight, residual, a product of theirs, the Gram.
        moments.append(blocks(m * n, _DOUBLE, 3) + blocks(n * n, _DOUBLE))
        moments += [blocks(m * n, _SINGLE, 2 + _LOSSES), rounding(m, rank)]
    return held + highest(rounding(stacked, linears[0].in_features), *moments)


def logits(work: Workload, sequences: Sequences) -> Held:
    """Logits of two parts that follow each other: the old stay until the new are there."""
    vocabulary = work.architecture.vocab_size
    rows = max(1, MAX_LOGITS_AT_ONCE // (vocabulary * sequences.length))
    sizes: list[int] = []
    for start in range(0, sequences.count, sequences.batch_rows):
        batch = min(sequences.batch_rows, sequences.count - start)
        sizes += [min(rows, batch - part) for part in range(0, batch, rows)]
        if len(sizes) > 4:
            break  # the largest have been seen: batches only end in smaller ones
    pairs = max(left + right for left, right in zip(sizes, [*sizes[1:], 0], strict=True))
    return Held(pairs * sequences.length * vocabulary * _SINGLE)


def _sum(parts: Iterable[Held]) -> Held:
    total = Held()
    for part in parts:
        total += part
    return total
