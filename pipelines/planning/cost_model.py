"""How long each stage takes: operations and bytes counted from the code, divided by this machine's speeds.

Rough by nature: products are counted exactly, what is bound by memory or by Python only in proportion. Expect
a factor of two at most on an otherwise idle machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import ModuleDescription
from ercsvd_deploy.linalg.symmetric import MIXED_FROM
from ercsvd_deploy.pipelines.planning.host_speed import HostSpeed
from ercsvd_deploy.pipelines.planning.resources import StageResources
from ercsvd_deploy.pipelines.planning.workload import Sequences, Workload
from ercsvd_deploy.pipelines.stages.factorize.linear import EXACT_RESIDUAL_UP_TO
from ercsvd_deploy.pipelines.stages.factorize.residual import BETAS_ON_OFFER
from ercsvd_deploy.recipe.stages import Recover

_OPERATIONS_OF_COLUMN = 5  # that GPTQ's loop starts for one column
_SUBSPACE_PASSES = 14  # over the matrix, of a randomized residual


@dataclass(frozen=True)
class Work:
    """Counted work; sums of it add up.

    Attributes:
        passing: Operations of layers and heads, in the precision they run in.
        single: Further float32 operations of products.
        double: Float64 operations of products.
        eigh: Sides of the matrices to decompose.
        moved: Bytes that pass through memory without products.
        columns: Columns of GPTQ's loop.
        read: Bytes from disk.
        written: Bytes to disk.
    """

    passing: float = 0
    single: float = 0
    double: float = 0
    eigh: tuple[int, ...] = ()
    moved: float = 0
    columns: float = 0
    read: float = 0
    written: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.passing + other.passing,
            self.single + other.single,
            self.double + other.double,
            self.eigh + other.eigh,
            self.moved + other.moved,
            self.columns + other.columns,
            self.read + other.read,
            self.written + other.written,
        )

    def seconds(self, speed: HostSpeed) -> float:
        """Return how long it takes at these speeds."""
        return (
            self.passing / speed.matmul_flops
            + self.single / speed.single_flops
            + self.double / speed.double_flops
            + sum(eigh_seconds(side, speed) for side in self.eigh)
            + self.moved / speed.copy_bytes
            + self.columns * _OPERATIONS_OF_COLUMN * speed.small_operation
            + self.read / speed.disk_read_bytes
            + self.written / speed.disk_write_bytes
        )


def eigh_seconds(side: int, speed: HostSpeed) -> float:
    """Return the seconds of an eigendecomposition: c n^3, c taken between the measured sides."""
    (small, quick), (large, slow) = sorted(speed.eigh_seconds.items())
    share = (math.log(side) - math.log(small)) / (math.log(large) - math.log(small))
    share = min(1.0, max(0.0, share))
    coefficient = math.exp((1 - share) * math.log(quick / small**3) + share * math.log(slow / large**3))
    return coefficient * side**3


def stage_seconds(
    work: Workload,
    described: Sequence[Mapping[str, ModuleDescription]],
    final_bytes: int,
    resources: Sequence[StageResources],
    speed: HostSpeed,
) -> dict[str, float]:
    """Return stage -> seconds, for the stages of `resources`.

    Args:
        work: What there is to compute.
        described: For every candidate, the final description of every altered Linear.
        final_bytes: Of the export.
        resources: The stages; their scratch is what they write.
        speed: Of this machine.
    """
    found = {}
    before = 0
    for needs in resources:
        counted = _counted(needs.stage, work, described[-1], final_bytes)
        if needs.stage != "export":
            counted += Work(written=max(0, needs.scratch_bytes - before))
        found[needs.stage] = counted.seconds(speed)
        before = needs.scratch_bytes
    return found


def _counted(
    stage: str, work: Workload, described: Mapping[str, ModuleDescription], final_bytes: int
) -> Work:
    recipe = work.recipe
    count: dict[str, Callable[[], Work]] = {
        "sensitivity": lambda: _sensitivity(work),
        "factorize": lambda: _factorize(work),
        "recover": lambda: _recover(work, recipe.recover, described, trains_factors=True),
        "quantize": lambda: _quantize(work, described),
        "recover quantized": lambda: _recover(
            work, recipe.recover_quantized, described, trains_factors=False
        ),
        "evaluate": lambda: _evaluate(work),
        "export": lambda: Work(read=2 * final_bytes, written=final_bytes),  # read again for the checksums
    }
    return count[stage]()


def _pass(work: Workload, sequences: Sequences | None, *, observed: bool = False) -> Work:
    """One pass through all layers, read from disk on the way."""
    layers = work.architecture.num_layers
    read = Work(read=work.layer_parameters * work.stored * layers)
    if sequences is None:
        return read
    layer = work.largest_layer
    tokens = sequences.tokens * layers
    queries = layer.groups[0][0].out_features
    attention = 2 * sequences.length * queries  # of two products, half of which a causal mask leaves out
    inner = layer.groups[-1][0].in_features
    touched = tokens * work.computed * (12 * work.hidden + 6 * inner + 6 * queries)
    observing = sum(2 * group[0].in_features ** 2 for group in layer.groups) * tokens if observed else 0
    return read + Work(
        passing=tokens * 2 * (work.layer_parameters + attention), single=observing, moved=touched
    )


def _sensitivity(work: Workload) -> Work:
    assert work.recipe.factorize is not None
    assert work.calibration is not None
    sequences = work.calibration.first(work.recipe.factorize.num_fisher_samples)
    layers = work.architecture.num_layers
    outputs = sum(2 * linear.out_features**2 for linear in work.largest_layer.linears)
    forward = _pass(work, sequences)
    return (
        forward
        + forward
        + forward
        + _head(work, sequences)
        + Work(single=outputs * sequences.tokens * layers)
    )


def _factorize(work: Workload) -> Work:
    settings = work.recipe.factorize
    assert settings is not None
    total = _pass(work, work.calibration, observed=settings.method != "svd")
    searched = work.calibration.first(settings.num_search_samples) if work.calibration else None
    trials = max(1, len(work.rank_plans))
    layers = work.compressed_layers()
    share = len(layers) / work.architecture.num_layers
    if searched is not None:
        one = _pass(work, searched)
        total += Work(passing=one.passing * trials * share, moved=one.moved * trials * share)
    for layer in layers:
        for linear in layer.linears:
            rank = work.highest_rank(linear)
            if not rank:
                continue
            total += _decomposing(linear)
            total += _truncating(linear, rank, exact=True, residual=settings.method == "erc_svd")
            is_small = min(linear.out_features, linear.in_features) <= EXACT_RESIDUAL_UP_TO
            if settings.beta == "auto":
                total += _decomposing(linear)
                for _ in range(trials * len(BETAS_ON_OFFER)):
                    total += _truncating(linear, rank, exact=is_small, residual=True)
                    total += _measuring(linear, rank)
            if settings.compressed_prefix_inputs:
                total += _decomposing(linear) + _compensating(linear)
            for _ in range(trials):
                total += _truncating(linear, rank, exact=is_small, residual=settings.method == "erc_svd")
                total += _measuring(linear, rank)
    if settings.compressed_prefix_inputs:
        total += _two_trajectories(work)
    return total


def _two_trajectories(work: Workload) -> Work:
    """Passes of the original and the compressed layers, and of each as far as to every group of Linears."""
    one, layer = _pass(work, work.calibration), work.largest_layer
    before, partial = 0, 0
    for group in layer.groups:
        partial += before
        before += sum(linear.parameters for linear in group)
    share = len(work.compressed_layers()) / work.architecture.num_layers
    passes = 1 + share * (1 + 2 * partial / work.layer_parameters)
    tokens = work.calibration.tokens * len(work.compressed_layers()) if work.calibration else 0
    moments = sum(3 * 2 * group[0].in_features ** 2 for group in layer.groups)
    return Work(
        passing=passes * one.passing, single=moments * tokens, moved=passes * one.moved, read=one.read
    )


def _compensating(linear: LinearShape) -> Work:
    m, n = linear.out_features, linear.in_features
    return Work(double=10 * m * n * n + n**3, moved=64 * (m * n + n * n))


def _decomposing(linear: LinearShape) -> Work:
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    columns = 3 * m * n * n if m > n else 0  # R of a tall weight, and its columns times the eigenvectors
    products = columns + 2 * smaller * n * n + smaller**2 * n
    if smaller < MIXED_FROM:
        return Work(double=products, eigh=(smaller,), moved=24 * m * n)
    return Work(single=products, double=smaller**3, eigh=(smaller,), moved=48 * m * n)


def _truncating(linear: LinearShape, rank: int, *, exact: bool, residual: bool) -> Work:
    m, n, smaller = linear.out_features, linear.in_features, min(linear.out_features, linear.in_features)
    work = Work(double=4 * m * n * rank, moved=64 * m * n)
    if not residual:
        return work
    if exact:
        return work + Work(double=2 * smaller * m * n, eigh=(smaller,))
    return work + Work(double=2 * m * n * (rank // 16 + 32) * _SUBSPACE_PASSES)


def _measuring(linear: LinearShape, rank: int) -> Work:
    m, n = linear.out_features, linear.in_features
    return Work(double=4 * m * n * rank + 4 * m * n * n, moved=128 * m * n)


def _recover(
    work: Workload,
    settings: Recover | None,
    described: Mapping[str, ModuleDescription],
    *,
    trains_factors: bool,
) -> Work:
    assert settings is not None
    assert work.calibration is not None
    total = _pass(work, work.calibration) + _pass(work, work.calibration)
    # A step is a pass forward and back of one batch.
    one = _pass(work, work.calibration.first(settings.batch_size))
    total += Work(passing=3 * one.passing * settings.steps, moved=3 * one.moved * settings.steps)
    for linear in work.architecture.linears:
        description = described.get(linear.name)
        for (rows, columns), _ in description.parts.values() if description else ():
            # Muon orthogonalizes a factor's update: five iterations of three products with its smaller side.
            # Integers are unpacked and scaled.
            smaller = min(rows, columns)
            products = 5 * (4 * smaller * rows * columns + 2 * smaller**3) if trains_factors else 0
            total += Work(passing=products * settings.steps, moved=40.0 * rows * columns * settings.steps)
    return total


def _quantize(work: Workload, described: Mapping[str, ModuleDescription]) -> Work:
    total = _pass(work, work.calibration, observed=True) + _pass(work, work.calibration)
    for linear in work.architecture.linears:
        description = described.get(linear.name)
        if description is None:
            continue
        m, n, rank = linear.out_features, linear.in_features, description.rank
        total += _rounding(rank or m, n)
        if rank is not None:
            # Losses of the whole Linear, the re-fit, and the second matrix under a Gram of its own.
            total += _rounding(m, rank) + Work(
                single=20 * m * n * n,
                double=4 * n * n * rank + 8 * m * n * rank,
                eigh=(rank,),
                moved=64 * m * n,
            )
    return total


def _rounding(rows: int, columns: int) -> Work:
    """GPTQ and rounding to nearest of one matrix, and their losses."""
    return Work(
        single=7 * rows * columns * columns,
        double=columns**3 / 3,
        moved=40 * rows * columns + 40 * columns**2 + 24.0 * rows * columns,
        columns=columns,
    )


def _head(work: Workload, sequences: Sequences) -> Work:
    logits = sequences.tokens * work.architecture.vocab_size
    return Work(passing=2 * logits * work.hidden, moved=40 * logits)


def _evaluate(work: Workload) -> Work:
    total = Work()
    for sequences in work.judged:
        for _ in ("original", "compressed"):
            total += _pass(work, sequences) + _head(work, sequences)
    return total
