"""What to calibrate a vision-language model on: exact answers of the embedded LLaVA after compression.

Run `python benchmarks/vision_calibration.py`. The language model is factorized at several ratios and
quantized, calibrated on Python source alone, on conversations about pictures alone, and on mixtures of both,
with image tokens weighted differently; the number of samples is the same for all. Each row is a whole run of
`recipes/demo-llava.yaml` with those fields changed; all layers are compressed, so that rows differ in nothing
else. Plain GPTQ and SVD-LLM stand beside. Writes `benchmarks/results/vision_calibration.json` and `.md`.
"""

from __future__ import annotations

import argparse
import random
import runpy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe

RECIPE = Path("recipes/demo-llava.yaml")
TEXT, PICTURES = "examples/text/calibration.txt", "examples/pictures/calibration.jsonl"
RATIOS = (0.2, 0.4, 0.6)
NUM_QUESTIONS = 2000  # more than the repository holds, drawn here: differences of a point then mean something
INT4 = "{quantize: {method: gptq, bits: 4, group_size: 32}}"
TEXT_ONLY = ("vision=null",)
PICTURES_ONLY = ("calibration.dataset=null", "vision.share=1.0")


def mixed(share: float, token_weight: float = 1.0) -> tuple[str, ...]:
    """Return the overrides for a mixture."""
    return (f"vision.share={share}", f"vision.token_weight={token_weight}")


CALIBRATIONS = {
    "text alone": TEXT_ONLY,
    "pictures alone": PICTURES_ONLY,
    "3/4 pictures": mixed(0.75),
    "3/4 pictures, image tokens x 0": mixed(0.75, 0.0),
    "3/4 pictures, image tokens x 4": mixed(0.75, 4.0),
    "1/4 pictures": mixed(0.25),
}


@dataclass(frozen=True)
class Result:
    """One compressed model."""

    method: str
    compression_ratio: float | None  # None: not factorized
    quantization: str
    calibration: str
    linear_bits_per_weight: float
    num_bytes: int
    exact_match: float  # on the questions drawn here
    exact_match_embedded: float  # on the repository's held-out questions
    perplexity: float


def measure(
    method: str, ratio: float | None, quantization: str, calibration: str, overrides: Sequence[str]
) -> tuple[Result, Result]:
    """Run the recipe; return the original model and the compressed one."""
    settings = f"method: {method}, compression_ratio: {ratio}, num_compressed_layers: all, rank_multiple: 32"
    stages = [f"{{factorize: {{{settings}}}}}"] if ratio is not None else []
    stages += [INT4] if quantization else []
    with tempfile.TemporaryDirectory() as work:
        recipe = load_recipe(
            RECIPE,
            [f"stages=[{', '.join(stages)}]", *CALIBRATIONS[calibration], *overrides],
            Path(work) / "x",
        )
        report, _ = run_recipe(recipe)
    found = [
        Result(
            name,
            ratio,
            quantization,
            calibration,
            figures.linear_bits_per_weight,
            figures.num_bytes,
            figures.exact_match["drawn"],
            figures.exact_match["held_out"],
            figures.perplexity["in_domain"],
        )
        for name, figures in (("original", report.original), (method, report.compressed))
    ]
    print(found[1], flush=True)
    return found[0], found[1]


def table(rows: Sequence[Result]) -> str:
    """Return a Markdown table of results."""
    columns = ["method", "removed", "integers", "calibrated on", "bits"]
    columns += [f"exact match, {NUM_QUESTIONS} questions", "the embedded 320", "perplexity, text"]
    return markdown_table(
        columns,
        [
            [
                row.method,
                "-" if row.compression_ratio is None else f"{100 * row.compression_ratio:.0f} %",
                row.quantization or "-",
                row.calibration,
                f"{row.linear_bits_per_weight:.2f}",
                f"{100 * row.exact_match:.1f} %",
                f"{100 * row.exact_match_embedded:.1f} %",
                f"{row.perplexity:.2f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override the recipe"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as drawn:
        made = runpy.run_path("examples/make_pictures.py")
        questions = made["write_conversations"](
            Path(drawn), "drawn", random.Random(20), count=NUM_QUESTIONS, turns=1, held_out=True
        )
        asked = f"evaluation.visual_questions.drawn={{dataset: {{conversations: {questions}}}}}"
        compare([asked, *arguments.set], arguments.threads)


def compare(overrides: Sequence[str], threads: int) -> None:
    """Measure all rows and write the results."""
    rows = []
    for ratio in RATIOS:
        for calibration in CALIBRATIONS if ratio == 0.4 else ("text alone", "pictures alone", "3/4 pictures"):
            original, found = measure("erc_svd", ratio, "", calibration, overrides)
            rows.append(found)
        rows.append(measure("svd_llm", ratio, "", "3/4 pictures", overrides)[1])
    integers = []
    for calibration in ("text alone", "3/4 pictures"):
        integers.append(measure("-", None, "GPTQ-4", calibration, overrides)[1])
        integers += [
            measure(method, ratio, "GPTQ-4", calibration, overrides)[1]
            for ratio in (0.2, 0.4)
            for method in ("svd_llm", "erc_svd")
        ]
    text = f"""# What to calibrate a vision-language model on

The embedded LLaVA ({original.num_bytes:,} bytes; exact match on {NUM_QUESTIONS} questions about
pictures of held-out scenes {100 * original.exact_match:.1f} %, perplexity on held-out Python source
{original.perplexity:.2f}). Only the language model is compressed, all of its layers. Equal numbers of
samples; "bits" are stored bits per weight of the decoder's Linears. One standard error of a share of
{100 * original.exact_match:.0f} % in {NUM_QUESTIONS} questions is
{100 * (original.exact_match * (1 - original.exact_match) / NUM_QUESTIONS) ** 0.5:.1f} points.

## Low rank

{table(rows)}

## With 4-bit integers

{table(integers)}
"""
    figures = {
        "original": asdict(original),
        "low_rank": [asdict(row) for row in rows],
        "int4": [asdict(row) for row in integers],
    }
    made_by = environment(".venv/bin/python benchmarks/vision_calibration.py", threads=threads)
    write_results("vision_calibration", made_by=made_by, figures=figures, text=text)


if __name__ == "__main__":
    main()
