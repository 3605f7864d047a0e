"""gptqmodel's GPTQ with its defaults; options: bits, group_size."""

from __future__ import annotations

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from peer_job import answer, linear_names, read_job, stored_bytes
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize, save, load what was saved and let gptqmodel dequantize it."""
    job = read_job()
    linears = linear_names(AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16))
    config = QuantizeConfig(bits=job.options["bits"], group_size=job.options["group_size"])
    model = GPTQModel.load(str(job.model), config, device="cpu")
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.tokens]
    with job.timed():
        model.quantize(rows, batch_size=1)
    model.save(str(job.checkpoint))
    loaded = GPTQModel.load(str(job.checkpoint), backend=BACKEND.TORCH, device="cpu")
    modules = dict(loaded.model.named_modules())
    # of the class: the instance's own is compiled at its first call, for longer than this takes
    dense = {name: type(modules[name]).dequantize_weight(modules[name]).T for name in linears}
    answer(job, "gptqmodel", dense, stored_bytes(job.checkpoint, linears))


if __name__ == "__main__":
    main()
