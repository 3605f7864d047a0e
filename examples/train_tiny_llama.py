"""Train an embedded text model on Python source: a small Llama, or a small Qwen2 of another shape.

A compression method cannot be judged on random weights: their spectra are flat and no perplexity
can fall. This model is small enough to commit (about 15 MB in bfloat16) and to train on a CPU, and
real enough that low-rank truncation hurts it in the way it hurts large models.

The Qwen2 is deeper and narrower, without grouped queries, with biases and an output layer of its own:
benchmarks run on both, so that nothing is tuned to one.

Run `python examples/train_tiny_llama.py --minutes 60` (`--shape qwen2`); the learning rate follows the
clock, so the same command suits a fast and a slow machine, and the log shows where held-out perplexity
flattens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from make_texts import TEXT_DIR, training_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

EXAMPLES = Path(__file__).parent
VOCABULARY_SIZE = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 24
PEAK_LEARNING_RATE = 2.5e-3
WEIGHT_DECAY = 0.1
SEED = 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `<s>` begins and `</s>` ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Concatenate all documents as one [tokens] stream, separated by end and begin tokens."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([t for ids in encoded for t in (bos, *ids, eos)], dtype=torch.long)


def model_config(shape: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Return the Llama's config (7.3 M parameters) or the Qwen2's (7.8 M)."""
    both = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape == "qwen2":
        return Qwen2Config(
            hidden_size=192,
            intermediate_size=640,
            num_hidden_layers=12,
            num_attention_heads=6,
            num_key_value_heads=6,
            tie_word_embeddings=False,
            **both,
        )
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        **both,
    )


@torch.no_grad()
def held_out_perplexity(model: PreTrainedModel, tokens: torch.Tensor, sequences: int = 64) -> float:
    """Perplexity on the first `sequences` windows of `tokens` [n]."""
    windows = tokens[: sequences * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    losses = []
    for batch in windows.split(32):
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch).loss.float())
    return math.exp(torch.stack(losses).mean().item())


def learning_rate(progress: float) -> float:
    """Warm up over 2 % of the budget, then a cosine to 2 % of the peak."""
    if progress < 0.02:
        return PEAK_LEARNING_RATE * max(progress, 1e-3) / 0.02
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * cosine)


def train(shape: str, minutes: float, device: str) -> None:
    """Train for `minutes` and write the model directory, the training log beside it."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    documents = training_documents()
    random.shuffle(documents)
    tokenizer = train_tokenizer(documents)
    stream = tokenize(tokenizer, documents).to(device)
    held_out = {
        name: tokenize(tokenizer, [(TEXT_DIR / f"{name}.txt").read_text()]).to(device)
        for name in ("in_domain", "out_of_domain")
    }
    model = AutoModelForCausalLM.from_config(model_config(shape, tokenizer)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} training tokens, {parameters:,} parameters", flush=True)

    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)

    started = last_report = time.monotonic()
    log: list[dict[str, float]] = []
    step = 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        starts = torch.randint(len(stream) - SEQUENCE_LENGTH, (BATCH_SIZE,))
        batch = torch.stack([stream[s : s + SEQUENCE_LENGTH] for s in starts.tolist()])
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if time.monotonic() - last_report > 60:
            last_report = time.monotonic()
            model.eval()
            log.append(
                {
                    "minutes": round((last_report - started) / 60, 1),
                    "tokens": step * BATCH_SIZE * SEQUENCE_LENGTH,
                    "train_perplexity": round(math.exp(loss.item()), 3),
                    **{n: round(held_out_perplexity(model, t), 3) for n, t in held_out.items()},
                }
            )
            model.train()
            print(json.dumps(log[-1]), flush=True)

    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = EXAMPLES / f"tiny-{shape}"
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["llama", "qwen2"], default="llama")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(arguments.shape, arguments.minutes, arguments.device)
