"""How well error control foresees: predicted damage beside measured KL divergence for 20 allocations.

    python benchmarks/predicted_damage.py --threads 1

Four kinds of allocations, each at five sizes: dense integers alone, low-rank factors, integers with low-rank
corrections, and all of them together. What a kind offers is measured once for its sizes. The divergence is
measured on held-out text of the calibration's kind and on text of another kind, both against the dense model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import environment, markdown_table, write_results

TEXT = Path("examples/text")
GROUP = 64
FACTORIZE = {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "output_metric": "fisher"}}
QUANTIZE = {"quantize": {"group_size": GROUP}}
ALL_BITS = [2, 3, 4, 5, 6, 8]
CORRECTIONS = [{"rank": 16, "bits": 4}, {"rank": 32, "bits": 4}]


@dataclass(frozen=True)
class Kind:
    """What an allocator may choose from, and the sizes that are asked for."""

    name: str
    stages: Sequence[Mapping[str, Any]]
    offer: Mapping[str, Any]  # of the target
    sizes: tuple[float, ...]  # overall bits


KINDS = (
    Kind("dense", [QUANTIZE], {"bits": ALL_BITS}, (2.5, 3.0, 3.5, 4.25, 6.0)),
    Kind(
        "factors",
        [FACTORIZE, QUANTIZE],
        {"bits": [8], "factor_bits": [3, 4, 6]},
        (2.25, 2.75, 3.25, 4.0, 5.0),
    ),
    Kind(
        "corrections",
        [QUANTIZE],
        {"bits": [2, 3, 4], "corrections": CORRECTIONS},
        (2.5, 2.75, 3.0, 3.5, 4.25),
    ),
    Kind(
        "all",
        [FACTORIZE, QUANTIZE],
        {"bits": [2, 3, 4, 6], "factor_bits": [3, 4], "corrections": CORRECTIONS[:1]},
        (2.25, 2.5, 3.0, 4.0, 5.0),
    ),
)


@dataclass(frozen=True)
class Row:
    """One allocation."""

    kind: str
    asked_bits: float
    bits: float  # stored, per weight of the decoder's Linears
    predicted: float  # sum of the chosen storages' damages, in nats per token
    kl: Mapping[str, float]  # text -> measured, in nats per token
    seconds: Mapping[str, float]  # of every stage


def measure(kind: Kind, size: float, arguments: argparse.Namespace, cache: Path) -> Row:
    """Run the pipeline up to the comparison with the dense model; what sizes share is in `cache`."""
    import yaml

    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent
    from ercsvd_deploy.recipe.load import load_recipe

    recipe = {
        "model": {"path": str(arguments.model)},
        "calibration": {
            "dataset": {"text": str(arguments.calibration)},
            "num_samples": arguments.samples,
            "sequence_length": 256,
            "seed": 3,
        },
        "stages": list(kind.stages),
        "target": {"overall_bits": size, **kind.offer},
        "evaluation": {
            "perplexity": {"held_out": str(arguments.held_out), "other": str(arguments.other)},
            "max_sequences": arguments.windows,
        },
    }
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        run = start_run(prepare_run(load_recipe(file), None), Path(work), shared=cache)
        run.run_stages(silent)
        report = run.report()
    return Row(
        kind.name,
        size,
        report.compressed.linear_bits_per_weight,
        report.stages["factorize"].predicted_kl,
        dict(report.change.logprob_kl),
        report.seconds,
    )


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's."""
    from scipy.stats import spearmanr

    return float(spearmanr(values, others).statistic)


def correlations(rows: Sequence[Row]) -> str:
    """Return the table of rank correlations: of the prediction, and of the size alone."""
    groups = {"all 20" if len(rows) == 20 else "all": rows}
    groups |= {kind.name: [row for row in rows if row.kind == kind.name] for kind in KINDS}
    cells = []
    for name, members in groups.items():
        predicted, sizes = [row.predicted for row in members], [-row.bits for row in members]
        kl = {text: [row.kl[text] for row in members] for text in ("held_out", "other")}
        ratios = sorted(row.kl["held_out"] / row.predicted for row in members)
        cells.append(
            [
                name,
                *(f"{rank_correlation(predicted, kl[text]):.3f}" for text in kl),
                *(f"{rank_correlation(sizes, kl[text]):.3f}" for text in kl),
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            ]
        )
    columns = [
        "allocations",
        "prediction, held out",
        "prediction, other",
        "bits alone, held out",
        "bits alone, other",
        "measured / predicted, held out",
    ]
    return markdown_table(columns, cells)


def table(rows: Sequence[Row]) -> str:
    """Return the table of all allocations, by predicted damage."""
    cells = [
        [
            row.kind,
            f"{row.bits:.2f}",
            f"{row.predicted:.4f}",
            *(f"{row.kl[text]:.4f}" for text in ("held_out", "other")),
            *(f"{row.kl[text] / row.predicted:.2f}" for text in ("held_out", "other")),
        ]
        for row in sorted(rows, key=lambda row: row.predicted)
    ]
    columns = [
        "on offer",
        "bits per weight",
        "predicted",
        "KL, held out",
        "KL, other",
        "ratio",
        "ratio, other",
    ]
    return markdown_table(columns, cells)


def write_report(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Write the results files."""
    measured_once = max(row.seconds.get("damages", 0.0) for row in rows)
    text = f"""# Predicted damage against measured divergence

{arguments.model.name}, {len(rows)} allocations of error control (docs/decisions/0009): the sum of the
predicted damages of what was chosen, and the KL divergence from the dense model, both in nats per token.
Calibrated on {arguments.samples} sequences of 256 tokens; the divergence is over {arguments.windows} windows
of held-out text of the same kind ("held out"), and of text of another ("other"). Groups of {GROUP}. On offer:
dense integers of 2 to 8 bits; factors of 3, 4 and 6 bits beside dense int8; integers of 2 to 4 bits with
corrections of rank 16 and 32 in 4 bits; and all of them together, integers of 2, 3, 4 and 6 bits, factors
in 3 and 4 bits, and corrections of rank 16.

Rank correlation (Spearman) of the divergence with the prediction and, to compare, with the number of bits
alone, which ranks the sizes of one kind by itself:

{correlations(rows)}

{table(rows)}

What a kind offers was measured once for its five sizes, in {measured_once:.0f} s at most.
"""
    command = f"python benchmarks/predicted_damage.py --threads {arguments.threads}"
    made_by = environment(command, threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


def main() -> None:
    """Measure every allocation and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    parser.add_argument("--calibration", type=Path, default=TEXT / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=TEXT / "in_domain.txt")
    parser.add_argument("--other", type=Path, default=TEXT / "out_of_domain.txt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="keep the stages' results, for a run that goes on")
    parser.add_argument("--name", default="predicted_damage", help="name of the results files")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    rows = []
    with nullcontext(arguments.cache) if arguments.cache else tempfile.TemporaryDirectory() as cache:
        for kind in KINDS:
            for size in kind.sizes:
                rows.append(measure(kind, size, arguments, Path(cache)))
                print(json.dumps(asdict(rows[-1])), flush=True)
    write_report(rows, arguments)


if __name__ == "__main__":
    main()
