"""What recovery gains, by what its loss looks at: the layer, layers behind it, or the model's predictions.

ln(perplexity / dense) of the embedded Llama on both texts, behind factors and behind integers; every row is
one run of the pipeline, as in quality.py, and all rows of a table share what comes before recovery.

    python benchmarks/recovery.py

Rows are kept in a file of JSON lines as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality  # also sets the number of threads, before torch
import torch
from quality import OURS, PREFIX, TEXTS, Point
from results_file import environment, markdown_table, write_results

MODEL = "tiny-llama"
SAMPLES = 128  # of 256 tokens
STEPS = 64
LEARNED = {"rounding": True}


@dataclass(frozen=True)
class Start:
    """What is recovered."""

    stages: tuple[dict[str, Any], ...]
    settings: dict[str, Any]  # of recovery, in all rows


PIVOTED = OURS | PREFIX | {"compression_ratio": 0.6, "rank_multiple": 8, "layout": "pivoted"}
STARTS = {
    "error control, pivoted, 60 % removed": Start(({"factorize": PIVOTED},), {}),
    "GPTQ-3, rounding learned": Start(({"quantize": {"bits": 3, "group_size": 64}},), LEARNED),
}
WAYS: dict[str, dict[str, Any] | None] = {
    "not recovered": None,
    "layer by layer": {},
    "one layer on": {"lookahead": 1},
    "layer by layer, end to end": {"end_to_end_steps": STEPS},
    "layer by layer, end to end four times as long": {"end_to_end_steps": 4 * STEPS},
}


def measure(start: Start, way: dict[str, Any] | None, shared: Path) -> dict[str, Any]:
    """Run the pipeline for one row; nothing is exported, and stages in `shared` are not repeated."""
    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent

    stages = start.stages
    if way is not None:
        stages = (*stages, {"recover": {"steps": STEPS, "batch_size": 4} | start.settings | way})
    recipe = quality.recipe_of(Point(MODEL, "", "", stages, samples=SAMPLES))
    prepared = prepare_run(recipe, None, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as work:
        run = start_run(prepared, Path(work), shared)
        begun = time.process_time()
        run.run_stages(silent)
        report = run.report()
    return {"excess": quality.excess_of(report), "core_seconds": time.process_time() - begun}


def main() -> None:
    """Measure what is missing and write both results files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=Path("out/recovery.jsonl"), help="rows measured so far")
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
    rows = {tuple(row["key"]): row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as shared:
        for name in arguments.only:
            for way, settings in WAYS.items():
                if (name, way) not in rows:
                    row = {"key": [name, way]} | measure(STARTS[name], settings, Path(shared))
                    rows[name, way] = row
                    print(name, way, {text: round(value, 4) for text, value in row["excess"].items()})
                    with arguments.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    tables = []
    for name in STARTS:
        cells = [
            [way, *(f"{rows[name, way]['excess'][text]:.4f}" for text in TEXTS)]
            for way in WAYS
            if (name, way) in rows
        ]
        cells += [[way, *("not measured" for _ in TEXTS)] for way in WAYS if (name, way) not in rows]
        tables.append(f"## {name}\n\n{markdown_table(['recovered', *TEXTS], cells)}")
    text = f"""# What the loss of recovery looks at

ln(perplexity / dense) of the embedded Llama (eight layers) on {quality.WINDOWS} windows of 256 tokens of each
held-out text. Calibrated on {SAMPLES} sequences of 256 tokens of Python source, which `in_domain` is too;
`out_of_domain` is English prose. {STEPS} steps of four sequences for each layer; "end to end" then trains all
layers together on the original's predictions, for as many steps.

{chr(10).join(f"{table}{chr(10)}" for table in tables)}"""
    made_by = environment("python benchmarks/recovery.py", threads=1)
    write_results("recovery", made_by=made_by, figures=list(rows.values()), text=text)


if __name__ == "__main__":
    main()
