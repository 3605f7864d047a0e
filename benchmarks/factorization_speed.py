"""How long factorization takes, beside the published procedure of SVD-LLM written down plainly.

One decoder layer shaped like LLaMA-7B's, random weights whose singular values decay, inputs whose features
are correlated. Both ways get the same weights and activations, one after the other for each matrix, in one
process:

    naive   for every Linear: the Gram of its inputs, X X^T, in float32; its Cholesky factor S in float64, the
            diagonal raised until there is one; the inverse of S; the full singular value decomposition of
            W S; the leading part times S^-1; roots of the singular values to both sides (the procedure
            described in SVD-LLM, arXiv 2403.07378). Once with the decomposition in float64, once in float32.
    ours    `InputStatistics` for every input that Linears share, then `decompose` and `truncate`

    python benchmarks/factorization_speed.py --threads 2
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

if "--threads" in sys.argv:  # before torch starts its pools
    os.environ.setdefault("OMP_NUM_THREADS", sys.argv[sys.argv.index("--threads") + 1])

import torch
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.errors import calibration_error
from ercsvd_deploy.linalg.truncation import Factors, truncate
from ercsvd_deploy.models.streaming.statistics import InputStatistics

REMOVED = 0.2  # share of the parameters
ROWS_AT_ONCE = 2048  # tokens of one batch


@dataclass(frozen=True)
class Row:
    """One Linear, done both ways."""

    name: str
    shape: tuple[int, int]
    rank: int
    naive_gram: float  # seconds
    naive_double: float  # with the decomposition in float64
    naive_single: float  # in float32
    our_gram: float  # of a Gram that Linears share, an equal part
    our_factors: float
    double_error: float  # ||(W - BA) X|| / ||W X||
    single_error: float
    our_error: float

    @property
    def double(self) -> float:
        """Seconds of the naive way in float64."""
        return self.naive_gram + self.naive_double

    @property
    def single(self) -> float:
        """Seconds of the naive way with float32."""
        return self.naive_gram + self.naive_single

    @property
    def ours(self) -> float:
        """Seconds of our way."""
        return self.our_gram + self.our_factors


def random_weight(out_features: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """Return a weight [out, in] whose singular values fall like a power of their position."""
    smaller = min(out_features, in_features)
    left = torch.randn(out_features, smaller, generator=generator) / smaller**0.5
    right = torch.randn(smaller, in_features, generator=generator) / in_features**0.5
    decay = torch.arange(1, smaller + 1).float().pow(-0.5)
    return (left * decay) @ right


def random_inputs(in_features: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return activations [tokens, in] with correlated features of different sizes."""
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    scales = torch.arange(1, in_features + 1).float().pow(-0.3)
    inputs = torch.randn(tokens, in_features, generator=generator) * scales
    return inputs @ mixing + 0.05 * torch.randn(tokens, in_features, generator=generator)


def naive_factors(weight: torch.Tensor, gram: torch.Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """Return the factors of the published procedure, with the decomposition in some precision."""
    size = gram.shape[0]
    raised = gram.double()
    while True:
        whitening, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            break
        smallest = torch.linalg.eigvalsh(raised)[0]
        raised = raised + (1e-6 - smallest) * torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.inv(whitening)
    left, values, right = torch.linalg.svd(weight.to(dtype) @ whitening.to(dtype), full_matrices=False)
    root = values[:rank].sqrt()
    factor_a = root[:, None] * right[:rank] @ inverse.to(dtype)
    return Factors(factor_a.float(), (left[:, :rank] * root).float())


def our_factors(weight: torch.Tensor, statistics: InputStatistics, rank: int) -> Factors:
    """Return the factors that this package makes."""
    made = decompose(weight, method="svd_llm", gram=statistics.gram, max_rank=rank)
    return truncate(made, weight, rank)


def timed(step: Callable[[], object]) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def batches(inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return the activations as they pass through a layer."""
    yield from inputs.split(ROWS_AT_ONCE)


def measure_group(
    names: list[str], out_features: int, inputs: torch.Tensor, generator: torch.Generator
) -> Iterator[Row]:
    """Yield the Linears that share one input [tokens, in]."""
    in_features = inputs.shape[1]
    statistics = InputStatistics.zeros(in_features, inputs.device)
    shared = timed(lambda: [statistics.add(batch) for batch in batches(inputs)])
    for name in names:
        weight = random_weight(out_features, in_features, generator)
        rank = int((1 - REMOVED) * out_features * in_features / (out_features + in_features))
        gram = torch.zeros(in_features, in_features)
        naive_gram = timed(lambda gram=gram: [gram.addmm_(batch.T, batch) for batch in batches(inputs)])
        ways: dict[str, Callable[[], Factors]] = {
            "double": partial(naive_factors, weight, gram, rank, torch.float64),
            "ours": partial(our_factors, weight, statistics, rank),
            "single": partial(naive_factors, weight, gram, rank, torch.float32),
        }
        found, seconds = {}, {}
        for way, make in ways.items():
            start = time.perf_counter()
            found[way] = make()
            seconds[way] = time.perf_counter() - start
        errors = {way: calibration_error(weight, each, statistics.gram) for way, each in found.items()}
        row = Row(
            name,
            (out_features, in_features),
            rank,
            naive_gram,
            seconds["double"],
            seconds["single"],
            shared / len(names),
            seconds["ours"],
            errors["double"],
            errors["single"],
            errors["ours"],
        )
        print(row, flush=True)
        yield row


def main() -> None:
    """Measure a layer and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="factorization_speed", help="name of the results files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    hidden, inner = arguments.hidden, arguments.intermediate
    rows: list[Row] = []
    for names, out_features, in_features in (
        (["q_proj", "k_proj", "v_proj"], hidden, hidden),
        (["o_proj"], hidden, hidden),
        (["gate_proj", "up_proj"], inner, hidden),
        (["down_proj"], hidden, inner),
    ):
        inputs = random_inputs(in_features, arguments.tokens, generator)
        rows += measure_group(names, out_features, inputs, generator)
    double, single, ours = (sum(getattr(row, way) for row in rows) for way in ("double", "single", "ours"))
    worst = max(row.our_error / min(row.double_error, row.single_error) for row in rows)
    cells = [
        [
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            str(row.rank),
            f"{row.naive_gram:.1f} + {row.naive_double:.1f}",
            f"{row.naive_gram:.1f} + {row.naive_single:.1f}",
            f"{row.our_gram:.1f} + {row.our_factors:.1f}",
            f"{row.double / row.ours:.2f}",
            f"{row.single / row.ours:.2f}",
        ]
        for row in rows
    ]
    totals = [f"{each:.1f}" for each in (double, single, ours)]
    cells.append(["the layer", "", "", *totals, f"{double / ours:.2f}", f"{single / ours:.2f}"])
    columns = ["Linear", "shape", "rank", "naive, float64", "naive, float32", "ours", "ratio", "to float32"]
    text = f"""# Speed of factorization

One decoder layer, hidden {hidden}, intermediate {inner}, at {100 * REMOVED:.0f} % of the parameters removed;
Grams over {arguments.tokens:,} tokens of float32 activations, {arguments.threads} threads. Figures are
seconds, of the Gram + of the factors; a Gram that Linears share counts for each of them in part. The last
two columns say how many times longer the naive way takes. Our error ||(W - BA) X|| / ||W X|| is at most
{worst:.7f} times the smaller one of the naive ways, for every Linear.

{markdown_table(columns, cells)}
"""
    command = f".venv/bin/python benchmarks/factorization_speed.py --threads {arguments.threads}"
    made_by = environment(command, threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


if __name__ == "__main__":
    main()
