"""What integers in the input embedding and the output layer cost the embedded Llama, beside GPTQ-4 elsewhere.

The model ties both. A copy that does not, with the same weights in both, tells what each costs by itself.

    python benchmarks/vocabulary.py
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import environment, markdown_table, write_results

MODEL = Path("examples/tiny-llama")
TEXTS = {name: f"examples/text/{name}.txt" for name in ("in_domain", "out_of_domain")}
WINDOWS = 64
LAYERS = {"bits": 4, "group_size": 64}
TIED: dict[str, dict[str, Any]] = {
    "in 16 bits": {},
    **{f"in {bits} bits": {"lm_head": {"bits": bits}} for bits in (8, 6, 5, 4)},
}
UNTIED: dict[str, dict[str, Any]] = {
    "in 16 bits": {},
    **{f"output layer in {bits} bits": {"lm_head": {"bits": bits}} for bits in (8, 4)},
    **{f"embedding in {bits} bits": {"embeddings": {"bits": bits}} for bits in (8, 4)},
    "both in 4 bits": {"lm_head": {"bits": 4}, "embeddings": {"bits": 4}},
}


@dataclass(frozen=True)
class Row:
    """What was measured."""

    model: str
    name: str
    num_bytes: int
    linear_bits: float
    model_bits: float
    excess: Mapping[str, float]  # ln(perplexity / dense) on each text
    kl: Mapping[str, float]  # nats per token


def untied_copy(directory: Path) -> Path:
    """Write the model with an output layer of its own, equal to the embedding; return `directory`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    [file] = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def measure(model: Path, kind: str, name: str, stage: Mapping[str, Any], shared: Path) -> Row:
    """Run the pipeline for one row; nothing is exported, and what rows share is in `shared`."""
    import yaml

    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent
    from ercsvd_deploy.recipe.load import load_recipe

    recipe = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration.txt"},
            "num_samples": 64,
            "sequence_length": 256,
            "seed": 3,
        },
        "stages": [{"quantize": LAYERS | stage}],
        "evaluation": {"perplexity": TEXTS, "max_sequences": WINDOWS},
    }
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        run = start_run(prepare_run(load_recipe(file), None), Path(work), shared=shared)
        run.run_stages(silent)
        report = run.report()
    before, after = report.original.perplexity, report.compressed.perplexity
    return Row(
        kind,
        name,
        report.compressed.num_bytes,
        report.compressed.linear_bits_per_weight,
        report.compressed.model_bits_per_weight or math.nan,
        {text: math.log(after[text] / before[text]) for text in TEXTS},
        dict(report.change.logprob_kl),
    )


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of rows of one model."""
    cells = [
        (
            row.name,
            f"{row.num_bytes / 1e6:.2f}",
            f"{row.linear_bits:.2f}",
            f"{row.model_bits:.2f}",
            *(f"{row.excess[text]:.4f}" for text in TEXTS),
            *(f"{row.kl[text]:.4f}" for text in TEXTS),
        )
        for row in rows
    ]
    measured = [f"{what}, {text}" for what in ("ln(perplexity / dense)", "KL") for text in TEXTS]
    return markdown_table(("", "MB", "bits per decoder weight", "of the model", *measured), cells)


def main() -> None:
    """Measure every row and write the results."""
    import torch

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch, "cache")
        untied = untied_copy(Path(scratch, "untied"))
        for kind, model, points in (("tied", MODEL, TIED), ("untied", untied, UNTIED)):
            for name, stage in points.items():
                rows.append(measure(model, kind, name, stage, shared))
                print(rows[-1], flush=True)
    of_kind = {kind: [row for row in rows if row.model == kind] for kind in ("tied", "untied")}
    text = (
        "# Integers in the input embedding and the output layer\n\n"
        "The embedded Llama with GPTQ-4 in its layers, groups of 64; 64 windows of each text.\n\n"
        f"## One matrix for both, as the model has it\n\n{table(of_kind['tied'])}\n\n"
        f"## A copy with two matrices of equal weights\n\n{table(of_kind['untied'])}"
    )
    write_results(
        "vocabulary",
        made_by=environment("python benchmarks/vocabulary.py", threads=1),
        figures=[asdict(row) for row in rows],
        text=text,
    )


if __name__ == "__main__":
    main()
