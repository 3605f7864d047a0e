"""llm-compressor's GPTQ with its defaults; options: bits, group_size."""

from __future__ import annotations

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer_job import answer, linear_names, read_job, stored_bytes
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main() -> None:
    """Quantize, save, load what was saved with its integers decompressed."""
    job = read_job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    linears = linear_names(model)
    rows = {"input_ids": job.tokens, "attention_mask": [[1] * len(row) for row in job.tokens]}
    weights = {"num_bits": job.options["bits"], "group_size": job.options["group_size"]}
    weights |= {"type": "int", "symmetric": True, "strategy": "group"}
    gptq = GPTQModifier(
        ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
    )
    with job.timed():
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=gptq,
            max_seq_length=len(job.tokens[0]),
            num_calibration_samples=len(job.tokens),
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(job.checkpoint, save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    dense = {name: loaded.get_submodule(name).weight for name in linears}
    answer(job, "llmcompressor", dense, stored_bytes(job.checkpoint, linears))


if __name__ == "__main__":
    main()
