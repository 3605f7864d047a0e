"""Bits of routed experts chosen by a budget, beside GPTQ with the same bits everywhere, at equal bytes.

The model is a small mixture of eight experts, trained here for a few minutes on the embedded Llama's
training documents with its tokenizer; it is kept in a directory, since it need not be trained again.

    python benchmarks/experts.py --model out/tiny-mixtral
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import environment, markdown_table, write_results

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples" / "tiny-llama"
TEXTS = {name: f"examples/text/{name}.txt" for name in ("in_domain", "out_of_domain")}
WINDOWS = 64
LENGTH = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-3
OFFERED = [2, 3, 4, 5, 6, 8]
GROUP = 64
UNIFORM = (2, 3, 4)


@dataclass(frozen=True)
class Row:
    """What was measured of one way to choose bits."""

    name: str
    bits_per_weight: float
    num_bytes: int
    bits_of_experts: Mapping[str, int]  # bits -> how many matrices of experts have so many
    excess: Mapping[str, float]  # ln(perplexity / dense) on each text
    kl: Mapping[str, float]  # nats per token


def train(directory: Path, minutes: float) -> None:
    """Train the mixture for so long on the CPU, and write it; the learning rate follows the clock."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    sys.path.insert(0, str(ROOT / "examples"))
    from make_texts import training_documents  # type: ignore[import-not-found]

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    encoded = tokenizer(training_documents(), add_special_tokens=False)["input_ids"]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    stream = torch.tensor([token for ids in encoded for token in (ends[0], *ids, ends[1])])
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,  # adds the loss that keeps experts in use
        router_aux_loss_coef=0.01,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=ends[0],
        eos_token_id=ends[1],
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * min(1.0, progress / 0.02) * max(cosine, 0.02)
        starts = torch.randint(len(stream) - LENGTH, (BATCH_SIZE,)).tolist()
        batch = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    print(f"{step} steps, perplexity {math.exp(float(loss)):.1f}", flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def measure(model: Path, name: str, sections: Mapping[str, Any], shared: Path) -> Row:
    """Run the pipeline for one row; nothing is exported, and what rows share is in `shared`."""
    import yaml

    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent
    from ercsvd_deploy.recipe.load import load_recipe

    recipe = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration.txt"},
            "num_samples": 128,
            "sequence_length": LENGTH,
            "seed": 3,
        },
        "evaluation": {"perplexity": TEXTS, "max_sequences": WINDOWS},
        **sections,
    }
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        run = start_run(prepare_run(load_recipe(file), None), Path(work), shared=shared)
        run.run_stages(silent)
        report = run.report()
    before, after = report.original.perplexity, report.compressed.perplexity
    matrices = report.results["quantize"].matrices
    bits = Counter(str(matrix.bits) for matrix in matrices if matrix.routed_tokens is not None)
    return Row(
        name,
        report.compressed.linear_bits_per_weight,
        report.compressed.num_bytes,
        dict(sorted(bits.items())),
        {text: math.log(after[text] / before[text]) for text in TEXTS},
        dict(report.change.logprob_kl),
    )


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows."""
    cells = [
        (
            row.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.num_bytes / 1e6:.3f}",
            ", ".join(f"{count} in {bits}" for bits, count in row.bits_of_experts.items()),
            *(f"{row.excess[text]:.4f}" for text in TEXTS),
            *(f"{row.kl[text]:.4f}" for text in TEXTS),
        )
        for row in rows
    ]
    measured = [f"{what}, {text}" for what in ("ln(perplexity / dense)", "KL") for text in TEXTS]
    return markdown_table(("", "bits per weight", "MB", "matrices of experts", *measured), cells)


def main() -> None:
    """Train the model if it is not there, measure every row, and write the results."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not (arguments.model / "config.json").is_file():
        train(arguments.model, arguments.minutes)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch, "cache")
        for bits in UNIFORM:
            stages = {"stages": [{"quantize": {"bits": bits, "group_size": GROUP}}]}
            rows.append(measure(arguments.model, f"GPTQ-{bits} everywhere", stages, shared))
            print(rows[-1], flush=True)
            target = {"target": {"overall_bits": rows[-1].bits_per_weight, "bits": OFFERED}}
            rows.append(measure(arguments.model, "chosen by the budget", stages | target, shared))
            print(rows[-1], flush=True)
    write_results(
        "experts",
        made_by=environment(
            f"python benchmarks/experts.py --model out/tiny-mixtral --minutes {arguments.minutes:g}",
            threads=1,
        ),
        figures=[asdict(row) for row in rows],
        text=(
            "# Bits of routed experts\n\nA mixture of 8 experts in 4 layers (2 for each token), trained for "
            f"{arguments.minutes:g} minutes on one core; {WINDOWS} windows of each text. The second row of a "
            f"pair has the bytes of the first; {', '.join(map(str, OFFERED))} bits are on offer for every "
            f"matrix, experts' and attention's.\n\n{table(rows)}"
        ),
    )


if __name__ == "__main__":
    main()
