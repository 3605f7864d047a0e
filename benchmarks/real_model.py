"""The paper's method on a real model, without mercy: what removing 20 to 60 % of SmolLM2-135M-Instruct costs.

Every row is one run of the pipeline in floating point; beside them stand plain integers, so that a reader
sees what the same bytes are worth. Calibration is English prose; other prose and Python source are judged.

    python examples/real_model.py && python benchmarks/real_model.py

Rows are kept as JSON lines as they are measured; a run that was stopped goes on from there. `--only` measures
some.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peer_runs.contenders import ERROR_CONTROL
from results_file import environment, markdown_table, write_results

TEXTS = {"prose": "examples/text/out_of_domain.txt", "python": "examples/text/in_domain.txt"}
RATIOS = (0.2, 0.4, 0.3, 0.5, 0.6)  # in the order in which they are measured
WINDOWS, LENGTH = 16, 512
ALL = {"num_compressed_layers": "all"}
PUBLISHED = {"token_weight": "uniform"}  # of the calibration section: tokens count by their energy
PIVOTED = ERROR_CONTROL | {"layout": "pivoted"}
METHODS: dict[str, dict[str, Any]] = {
    "svd_llm": {"method": "svd_llm"} | ALL,
    "erc_svd, best k": {"method": "erc_svd"},
    "error control": ERROR_CONTROL,
    "error control, pivoted": PIVOTED,
    "error control, pivoted, recovered": PIVOTED,
    "svd_llm, tokens alike": {"method": "svd_llm"} | ALL,
    "erc_svd, beta 0.05": {"method": "erc_svd", "beta": 0.05} | ALL,
    "erc_svd, beta auto": {"method": "erc_svd", "beta": "auto"} | ALL,
    "erc_svd, beta auto, tokens alike": {"method": "erc_svd", "beta": "auto"} | ALL,
    "erc_svd, beta 0": {"method": "erc_svd", "beta": 0.0} | ALL,
    "svd": {"method": "svd"} | ALL,
    "asvd": {"method": "asvd"} | ALL,
}
COUNT_TOKENS_ALIKE = ("error control", "svd_llm, tokens alike", "erc_svd, beta auto, tokens alike")
RECOVER = {"recover": {"steps": 128, "batch_size": 2}}
INTEGERS = ((8, 64), (4, 64), (4, 32))


@dataclass(frozen=True)
class Point:
    """One row to measure; a ratio of None is plain integers."""

    name: str
    ratio: float | None
    stages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """What was measured, or the error that ended it."""

    name: str
    ratio: float | None
    removed: float = 0.0
    bits: float = 16.0
    excess: Mapping[str, float] | None = None  # ln(perplexity / dense) on each text
    seconds: float = 0.0
    error: str | None = None


def points() -> Iterator[Point]:
    """Yield everything to measure."""
    for bits, group_size in INTEGERS:
        stage = {"quantize": {"bits": bits, "group_size": group_size}}
        yield Point(f"GPTQ-{bits}, groups of {group_size}", None, (stage,))
    for ratio in RATIOS:
        for name, settings in METHODS.items():
            stage = {"factorize": {**settings, "compression_ratio": ratio, "rank_multiple": 8}}
            yield Point(name, ratio, (stage, RECOVER) if name.endswith("recovered") else (stage,))


def measure(point: Point, arguments: argparse.Namespace, shared: Path) -> Row:
    """Run the pipeline for one row; nothing is exported, and what rows share is in `shared`."""
    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        run = start_run(prepare_run(recipe_of(point, arguments), None), Path(work), shared=shared)
        try:
            run.run_stages(silent)
            report = run.report()
        except Exception as error:  # noqa: BLE001 - many rows survive any one of them
            return Row(point.name, point.ratio, error=f"{type(error).__name__}: {error}")
    original, compressed = report.original, report.compressed
    return Row(
        point.name,
        point.ratio,
        1 - compressed.linear_parameters / original.linear_parameters,
        compressed.linear_bits_per_weight,
        {text: math.log(compressed.perplexity[text] / original.perplexity[text]) for text in TEXTS},
        time.monotonic() - started,
    )


def recipe_of(point: Point, arguments: argparse.Namespace) -> Any:
    """Return the recipe of a row, without an export."""
    import yaml

    from ercsvd_deploy.recipe.load import load_recipe

    calibration = {
        "dataset": {"text": "examples/text/calibration_prose.txt"},
        "num_samples": arguments.samples,
        "sequence_length": LENGTH,
        "seed": 3,
    }
    if point.ratio is not None and not point.name.startswith(COUNT_TOKENS_ALIKE):
        calibration |= PUBLISHED
    recipe: dict[str, Any] = {
        "model": {"path": str(arguments.model), "dtype": "bfloat16"},
        "calibration": calibration,
        "stages": list(point.stages),
        "evaluation": {"perplexity": TEXTS, "max_sequences": WINDOWS},
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        return load_recipe(file)


def table(rows: Sequence[Row]) -> str:
    """Return the table of the methods: a column a ratio, prose / Python in each."""
    cells = []
    ratios = sorted(RATIOS)
    for name in METHODS:
        by_ratio = {row.ratio: row for row in rows if row.name == name}
        if by_ratio:
            cells.append([name, *(_cell(by_ratio.get(ratio)) for ratio in ratios)])
    return markdown_table(["prose / Python", *(f"{100 * ratio:.0f} % removed" for ratio in ratios)], cells)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.excess is None:
        return "failed"
    return " / ".join(f"{row.excess[text]:.3f}" for text in TEXTS)


def integers_table(rows: Sequence[Row]) -> str:
    """Return the table of plain integers, with the share of the bytes that they remove."""
    cells = [
        [row.name, f"{row.bits:.2f}", f"{100 * (1 - row.bits / 16):.0f} %", _cell(row)]
        for row in rows
        if row.ratio is None and row.error is None
    ]
    return markdown_table(["", "bits per weight", "bytes removed", "prose / Python"], cells)


def write_report(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Write the results files."""
    failed = [f"- {row.name}, {row.ratio}: {row.error}" for row in rows if row.error]
    text = f"""# Low rank on a real model

ln(perplexity / dense) of SmolLM2-135M-Instruct (`examples/real_model.py`) on {WINDOWS} windows of {LENGTH}
tokens of each held-out text, English prose / Python source; calibrated on {arguments.samples} sequences of
{LENGTH} tokens of other English prose. "-" is not measured. The model's weights were four-bit integers in
groups of 32 once.

In floating point, by the share of the decoder's parameters that is removed. The published methods count
tokens by their energy (`calibration: {{token_weight: uniform}}`), error control counts them alike:

{table(rows)}

Plain integers, which remove more bytes:

{integers_table(rows)}

{chr(10).join(["What failed:", "", *failed]) if failed else ""}
"""
    command = f".venv/bin/python benchmarks/real_model.py --samples {arguments.samples}"
    made_by = environment(command, threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("out/SmolLM2-135M-Instruct"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of names")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument(
        "--rows", type=Path, default=Path("out/real_model.jsonl"), help="rows measured so far"
    )
    parser.add_argument("--name", default="real_model", help="name of the results files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: dict[tuple[str, float | None], Row] = {}
    if arguments.rows.exists():
        lines = arguments.rows.read_text().splitlines()
        rows = {(row.name, row.ratio): row for row in (Row(**json.loads(line)) for line in lines)}
    shared = arguments.rows.with_suffix(".stages")  # stays, so that a run that goes on need not repeat it
    shared.mkdir(exist_ok=True)
    with arguments.rows.open("a") as file:
        for point in points():
            is_asked = arguments.only is None or point.name.startswith(tuple(arguments.only))
            is_asked &= point.ratio is None or point.ratio in arguments.ratios
            if is_asked and (point.name, point.ratio) not in rows:
                row = measure(point, arguments, shared)
                rows[point.name, point.ratio] = row
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                print(row, flush=True)
    write_report(list(rows.values()), arguments)


if __name__ == "__main__":
    main()
