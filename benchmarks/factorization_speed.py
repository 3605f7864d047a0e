"""How long factorization takes, beside the published procedure of SVD-LLM written down plainly.

One decoder layer shaped like LLaMA-7B's, random weights whose singular values decay, inputs whose features are
correlated. Both ways get the same weights and activations, one after the other for each matrix, in one process:

    naive   for every Linear: the Gram of its inputs, X X^T, in float32; its Cholesky factor S in float64, the
            diagonal raised until there is one; the inverse of S; the full singular value decomposition of
            W S; the leading part times S^-1; roots of the singular values to both sides (the procedure
            described in SVD-LLM, arXiv 2403.07378)
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

if "--threads" in sys.argv:  # before torch starts its pools
    os.environ.setdefault("OMP_NUM_THREADS", sys.argv[sys.argv.index("--threads") + 1])

import torch
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.factorize import Factors, calibration_error, decompose, truncate
from ercsvd_deploy.layerwise import InputStatistics

REMOVED = 0.2  # share of the parameters
ROWS_AT_ONCE = 2048  # tokens of one batch


@dataclass(frozen=True)
class Row:
    """One Linear, done both ways."""

    name: str
    shape: tuple[int, int]
    rank: int
    naive_gram: float  # seconds
    naive_factors: float
    our_gram: float  # the share of the Linears that read the same input is equal
    our_factors: float
    naive_error: float  # ||(W - BA) X|| / ||W X||
    our_error: float

    @property
    def ratio(self) -> float:
        """How many times longer the naive way takes."""
        return (self.naive_gram + self.naive_factors) / (self.our_gram + self.our_factors)


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


def naive_factors(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factors:
    """Return the factors of the published procedure."""
    size = gram.shape[0]
    raised = gram.double()
    while True:
        whitening, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            break
        smallest = torch.linalg.eigvalsh(raised)[0]
        raised = raised + (1e-6 - smallest) * torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.inv(whitening)
    left, values, right = torch.linalg.svd(weight.double() @ whitening, full_matrices=False)
    root = values[:rank].sqrt()
    return Factors((root[:, None] * right[:rank] @ inverse).float(), (left[:, :rank] * root).float())


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
        found: dict[str, Factors] = {}

        def naively(weight: torch.Tensor = weight, gram: torch.Tensor = gram, rank: int = rank) -> None:
            found["naive"] = naive_factors(weight, gram, rank)

        def as_we_do(weight: torch.Tensor = weight, rank: int = rank) -> None:
            made = decompose(weight, method="svd_llm", gram=statistics.gram, max_rank=rank)
            found["ours"] = truncate(made, weight, rank)

        naive_seconds, our_seconds = timed(naively), timed(as_we_do)
        errors = {way: calibration_error(weight, each, statistics.gram) for way, each in found.items()}
        row = Row(
            name,
            (out_features, in_features),
            rank,
            naive_gram,
            naive_seconds,
            shared / len(names),
            our_seconds,
            errors["naive"],
            errors["ours"],
        )
        print(row, f"ratio {row.ratio:.2f}", flush=True)
        yield row


def main() -> None:
    """Measure a layer and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=16384)
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
    naive = sum(row.naive_gram + row.naive_factors for row in rows)
    ours = sum(row.our_gram + row.our_factors for row in rows)
    worst = max(row.our_error / row.naive_error for row in rows)
    cells = [
        [
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            str(row.rank),
            f"{row.naive_gram:.1f} + {row.naive_factors:.1f}",
            f"{row.our_gram:.1f} + {row.our_factors:.1f}",
            f"{row.ratio:.2f}",
            f"{row.naive_error:.6f}",
            f"{row.our_error:.6f}",
        ]
        for row in rows
    ]
    cells.append(["the layer", "", "", f"{naive:.1f}", f"{ours:.1f}", f"{naive / ours:.2f}", "", ""])
    columns = ["Linear", "shape", "rank", "naive, s", "ours, s", "ratio", "naive error", "our error"]
    text = f"""# Speed of factorization

One decoder layer, hidden {hidden}, intermediate {inner}, at {100 * REMOVED:.0f} % of the parameters removed;
Grams over {arguments.tokens:,} tokens of float32 activations, {arguments.threads} threads. Seconds are those of
the Gram + those of the factors; a Gram that Linears share counts for each of them in part. Errors are
||(W - BA) X|| / ||W X||, in float64 from the exact Gram. Of all Linears our error is at most {worst:.6f} times
the naive one.

{markdown_table(columns, cells)}
"""
    command = f".venv/bin/python benchmarks/factorization_speed.py --threads {arguments.threads}"
    made_by = environment(command, threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


if __name__ == "__main__":
    main()
