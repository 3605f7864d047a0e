"""AutoRound; options: bits, or mixed_bits and their average_bits; group_size, iterations, batch_size.

Its mixed scheme reads calibration from a file of texts alone: the tokens are decoded for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from peer_job import answer, linear_names, read_job
from transformers import AutoModelForCausalLM, AutoTokenizer

SCALE_BITS = 16  # float16; a zero point of `bits` bits beside it


def main() -> None:
    """Quantize; the model's weights are then the rounded ones, each Linear with its bits and group size."""
    job = read_job()
    options = job.options
    # float32: the rounded weights are read from the model itself, and must lie on their grid
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    linears = linear_names(model)
    dataset: Any = [{key: torch.tensor(rows) for key, rows in batch.items()} for batch in job.batches]
    length = len(job.tokens[0])
    group_size = options["group_size"]
    chosen = {"scheme": "W4A16", "bits": options.get("bits"), "group_size": group_size, "sym": True}
    if "mixed_bits" in options:
        schemes = [
            QuantizationScheme(bits=bits, group_size=group_size, sym=True) for bits in options["mixed_bits"]
        ]
        chosen = {"scheme": AutoScheme(avg_bits=options["average_bits"], options=schemes)}
        texts = [tokenizer.decode(row).strip() for row in job.tokens]
        length = min(len(tokenizer(text).input_ids) for text in texts)  # shorter ones would be left out
        dataset = str(job.folder / "texts.json")
        Path(dataset).write_text(json.dumps(texts))
    rounding = AutoRound(
        model,
        tokenizer,
        dataset=dataset,
        seqlen=length,
        nsamples=len(job.tokens),
        iters=options["iterations"],
        batch_size=options["batch_size"],
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        enable_torch_compile=False,
        **chosen,
    )
    with job.timed():
        rounded, layers = rounding.quantize()
    dense, stored, by_bits = {}, 0.0, {}
    for name in linears:
        weight = rounded.get_submodule(name).weight
        bits, group = layers[name]["bits"], layers[name]["group_size"]
        by_bits[bits] = by_bits.get(bits, 0) + 1
        stored += weight.numel() * (bits + (SCALE_BITS + bits) / group) / 8
        dense[name] = weight
    counts = ", ".join(f"{number} Linears at {bits} bits" for bits, number in sorted(by_bits.items()))
    note = f"{options['iterations']} iterations of {options['batch_size']} sequences; {counts}"
    answer(job, "auto-round", dense, round(stored), note)


if __name__ == "__main__":
    main()
