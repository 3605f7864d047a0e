"""What vLLM answers for every kind of storage, beside this package's own answers, on a real model.

Each row is one recipe for SmolLM2-135M-Instruct with the gate `serving_parity`: compressed, exported, loaded
in the installed vLLM, which scores and continues prompts. A GPU is used where there is one, with its kernels.

    python examples/real_model.py && python benchmarks/served_kinds.py

Rows are kept as JSON lines as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peer_runs.contenders import ERROR_CONTROL
from results_file import environment, markdown_table, write_results

SAMPLES, LENGTH = 16, 512
FACTORIZE = {
    "method": "svd_llm",
    "compression_ratio": 0.2,
    "rank_multiple": 32,
    "num_compressed_layers": "all",
}
MIXED = {"bits": [2, 3, 4, 5, 6, 8], "group_sizes": [32, 64, 128]}
EVERYTHING = MIXED | {
    "factor_bits": [3, 4, 8],
    "corrections": [{"rank": 16, "bits": 8}, {"rank": 32, "bits": 4}],
}


def integers(bits: int = 4, **settings: Any) -> dict[str, Any]:
    """Return a stage that quantizes."""
    return {"quantize": {"bits": bits, "group_size": 64, **settings}}


KINDS: dict[str, dict[str, Any]] = {
    **{f"integers of {bits} bits": {"stages": [integers(bits)]} for bits in (8, 6, 5, 4, 3, 2)},
    "integers of 4 bits, format compressed-tensors": {
        "stages": [integers()],
        "export": {"format": "compressed-tensors"},
    },
    "integers of mixed bits, 3.0, format auto-round": {
        "stages": [integers()],
        "target": {"overall_bits": 3.0, "bits": [2, 3, 4, 8], "group_sizes": [64]},
        "export": {"format": "auto-round"},
    },
    "integers of 4 bits, vocabulary of 8": {
        "stages": [integers(embeddings={"bits": 8, "group_size": 64})],
    },
    "low rank, 20 % removed": {"stages": [{"factorize": FACTORIZE}]},
    "low rank, 20 % removed, factors of 4 bits": {
        "stages": [{"factorize": FACTORIZE}, integers(group_size=32)]
    },
    "low rank, 20 % removed, factors of 3 bits": {
        "stages": [{"factorize": FACTORIZE}, integers(3, group_size=32)]
    },
    "low rank, 20 % removed, pivoted": {"stages": [{"factorize": FACTORIZE | {"layout": "pivoted"}}]},
    "all options of a budget, 3.0 bits": {
        "stages": [{"factorize": ERROR_CONTROL}, integers()],
        "target": {"overall_bits": 3.0, **EVERYTHING},
    },
}


@dataclass(frozen=True)
class Row:
    """One kind at one tensor-parallel size, or the error that ended it.

    Attributes:
        kind: Of storage.
        size: Tensor-parallel size.
        mode: How vLLM ran.
        mean: Mean absolute difference of the prompts' log-probabilities, in nats.
        decoded: The same, of the tokens that vLLM generated.
        largest: The largest of all.
        alike: Share of the greedy tokens that are the reference's too.
        error: What ended it.
    """

    kind: str
    size: int
    mode: str = ""
    mean: float = 0.0
    decoded: float = 0.0
    largest: float = 0.0
    alike: float = 0.0
    error: str | None = None


def measure(kind: str, sizes: Sequence[int], arguments: argparse.Namespace) -> list[Row]:
    """Run the recipe of a kind; return a row for each tensor-parallel size."""
    from ercsvd_deploy.pipelines.flow import RunOptions, run_recipe
    from ercsvd_deploy.recipe.load import load_recipe

    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe_of(kind, sizes, arguments, Path(work, "export"))))
        try:
            report, _ = run_recipe(load_recipe(file), options=RunOptions(cache=arguments.cache))
        except Exception as error:  # noqa: BLE001 - the other kinds survive any one of them
            return [Row(kind, size, error=f"{type(error).__name__}: {error}") for size in sizes]
    serving = report.as_json()["serving"]
    if serving is None:
        return [Row(kind, size, error="; ".join(report.warnings)) for size in sizes]
    return rows_of(kind, serving)


def rows_of(kind: str, serving: Mapping[str, Any]) -> list[Row]:
    """Return the rows that a report's `serving` holds."""
    rows = []
    for size in serving["sizes"]:
        (texts,) = size["agreements"]
        rows.append(
            Row(
                kind,
                size["tensor_parallel_size"],
                size["mode"],
                texts["prompt"]["mean"],
                texts["decoded"]["mean"],
                texts["together"]["largest"],
                texts["greedy_agreeing"] / texts["decoded"]["num_tokens"],
            )
        )
    rows += [
        Row(kind, failure["tensor_parallel_size"], error=failure["exception"])
        for failure in serving["failures"]
    ]
    return rows


def recipe_of(kind: str, sizes: Sequence[int], arguments: argparse.Namespace, export: Path) -> dict[str, Any]:
    """Return the recipe of a kind; nothing is judged but what vLLM answers."""
    described = dict(KINDS[kind])
    return {
        "model": {"path": str(arguments.model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration_prose.txt"},
            "num_samples": SAMPLES,
            "sequence_length": LENGTH,
            "seed": 3,
        },
        "evaluation": {
            "perplexity": {
                "prose": "examples/text/out_of_domain.txt",
                "python": "examples/text/in_domain.txt",
            },
            "max_sequences": 4,
            "sequence_length": LENGTH,
        },
        "gates": {
            "serving_parity": {"mean_difference": 1.0, "eager": not arguments.compiled},
            "built_in_text": False,
        },
        "serving": {"tensor_parallel_sizes": list(sizes)},
        **described,
        "export": {"format": "vllm", **described.get("export", {}), "path": str(export)},
    }


def write_report(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Write the results files."""
    cells = [
        [
            row.kind,
            str(row.size),
            row.mode,
            *(f"{value:.3f}" for value in (row.mean, row.decoded, row.largest)),
            f"{100 * row.alike:.0f} %",
        ]
        for row in rows
        if row.error is None
    ]
    failed = [f"- {row.kind}, tensor-parallel size {row.size}: {row.error}" for row in rows if row.error]
    columns = ["", "tensor-parallel size", "vLLM", "prompts", "decoding", "largest", "greedy tokens alike"]
    text = f"""# What vLLM answers for every kind of storage

SmolLM2-135M-Instruct (`examples/real_model.py`), calibrated on {SAMPLES} sequences of {LENGTH} tokens.
Absolute differences of log-probabilities between vLLM in bfloat16 and this package's own reading of the same
export in float32, in nats: their means over the tokens of eight prompts of two texts, and over what vLLM
generated behind them, and the largest of all. The rounding of activations to bfloat16 is in every row, and is
most of what integers of eight bits show.

{markdown_table(columns, cells)}

{chr(10).join(["What failed:", "", *failed]) if failed else ""}
"""
    made_by = environment("python benchmarks/served_kinds.py", threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("out/SmolLM2-135M-Instruct"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1], help="tensor-parallel sizes")
    parser.add_argument("--compiled", action="store_true", help="as users serve, not eagerly")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of names")
    parser.add_argument("--rows", type=Path, default=Path("out/served_kinds.jsonl"), help="measured so far")
    parser.add_argument("--cache", type=Path, default=Path("out/served_kinds.stages"))
    parser.add_argument("--name", default="served_kinds", help="name of the results files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    for kind in KINDS:
        if arguments.only is None or kind.startswith(tuple(arguments.only)):
            missing = [
                size for size in arguments.sizes if (kind, size) not in {(r.kind, r.size) for r in rows}
            ]
            if not missing:
                continue
            print(f"{kind} ...", flush=True)
            found = measure(kind, missing, arguments)
            rows += found
            with arguments.rows.open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
    order = list(KINDS)
    write_report(sorted(rows, key=lambda row: (order.index(row.kind), row.size)), arguments)


if __name__ == "__main__":
    main()
