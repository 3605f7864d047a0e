"""A checkpoint as a GGUF file for llama.cpp to quantize: its tensors and sizes, without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

LAYERS = "model.layers."
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(model: Path, path: Path) -> None:
    """Write the tensors of a Llama or Qwen2 in float32, rows in the checkpoint's order.

    llama.cpp would want the rows of q and k in another order to compute with; it quantizes each by itself.
    """
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(path, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            writer.add_tensor(gguf_name(name), tensor.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith(LAYERS):
        return f"{OUTSIDE[module]}.{leaf}"
    index, _, local = module.removeprefix(LAYERS).partition(".")
    return f"blk.{index}.{(LINEARS | NORMS)[local]}.{leaf}"
