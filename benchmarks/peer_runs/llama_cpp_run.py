"""llama.cpp's quantization; options: file_type, gguf. It reads no calibration tokens.

`gguf` (in the job's options) is a file that the model was made of, which llama.cpp quantizes again, from the
same weights; without it the checkpoint is written as one. The table of tokens becomes float16, since the
other peers leave it alone too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import llama_cpp
import torch
from gguf import GGUFReader, dequantize
from gguf_file import LINEARS, write_gguf
from peer_job import answer, read_job

NAMES = {theirs: name for name, theirs in LINEARS.items()}
HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}


def main() -> None:
    """Quantize, and turn the blocks back with the gguf package."""
    job = read_job()
    job.checkpoint.mkdir()
    path = job.checkpoint / "model.gguf"
    original = job.options.get("gguf")
    source = Path(original) if original else job.checkpoint / "original.gguf"
    if original is None:
        write_gguf(job.model, source)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.options['file_type']}")
    parameters.allow_requantize = True
    parameters.token_embedding_type = parameters.output_tensor_type = llama_cpp.GGML_TYPE_F16
    with job.timed():
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters)
    if code:
        raise RuntimeError(f"llama_model_quantize ended with {code}")
    reader = GGUFReader(path)
    dense, stored, kinds = {}, 0, Counter()
    for tensor in reader.tensors:
        block, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        if name not in NAMES or not tensor.name.endswith(".weight"):
            continue
        rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if original and name in HEADS:
            rows = unpermuted(rows, int(reader.fields[HEADS[name]].contents()))
        dense[f"model.layers.{block.removeprefix('blk.')}.{NAMES[name]}"] = rows
        stored += tensor.n_bytes
        kinds[tensor.tensor_type.name] += 1
    counts = ", ".join(f"{number} matrices in {kind}" for kind, number in kinds.most_common())
    answer(job, "llama-cpp-python", dense, stored, f"no calibration; {counts}")


def unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k, in which the two halves of a rotation are neighbours."""
    out_features, in_features = rows.shape
    pairs = rows.view(heads, out_features // heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


if __name__ == "__main__":
    main()
