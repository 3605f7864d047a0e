"""Train the embedded vision-language model: a small CLIP-style tower in front of the embedded Llama.

As LLaVA was made from parts that could already see and read, so is this one. First the tower learns
alone, from scratch, to say what each patch of a picture shows and where it lies. Then it is frozen, and
projector and language model learn to answer questions and to describe (see `make_pictures.py`), with Python
source mixed in so that the model can still read. Loss is taken on the answers only. No held-out scene is
drawn for training.

Run `python examples/train_tiny_llava.py --minutes 50`; the learning rate follows the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from make_pictures import COLORS, PICTURE_DIR, SHAPES, SIDE, Scene, ask, describe, draw, random_scene
from make_texts import training_documents
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from train_tiny_llama import EXAMPLES, tokenize
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

MODEL_DIR = Path(__file__).parent / "tiny-llava"
PATCH = 32  # one cell of the pictures' grid
PATCHES = (SIDE // PATCH) ** 2
IMAGE_TOKEN = "<image>"
TURNS = 5
DESCRIBED = 0.5  # share of the conversations that have a full description as their first or last turn
TOWER_SHARE = 0.04  # of the minutes
TOWER_BATCH = 128
BATCH_SIZE = 16  # conversations in a step
# Rows are padded to one length: on a CPU every new shape of a matrix product costs more than the product.
LENGTH = 192
TEXT_ROWS = 2  # rows of Python source in a step
TEXT_LENGTH = 128
PEAK_LEARNING_RATE = 6e-4
TOWER_LEARNING_RATE = 1e-3
SEED = 5
IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ASSISTANT: ' }}"
    "{% else %}{{ message.role | upper + ': ' }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's preprocessing, at the pictures' own size."""
    size = {"shortest_edge": SIDE}
    return CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})


def pixels(pictures: list[Image.Image], processor: CLIPImageProcessorPil) -> torch.Tensor:
    """Return what the processor would, [n, 3, SIDE, SIDE], without its per-call cost."""
    raw = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    mean = torch.tensor(processor.image_mean)[:, None, None]
    return (raw / 255 - mean) / torch.tensor(processor.image_std)[:, None, None]


def build(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return tower and projector at random, the language model with the embedded Llama's weights."""
    text = LlamaConfig.from_pretrained(EXAMPLES / "tiny-llama")
    text.tie_word_embeddings = False
    text.vocab_size = len(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    state = model.state_dict()
    for name, tensor in load_file(EXAMPLES / "tiny-llama" / "model.safetensors").items():
        own = state[name.replace("model.", "model.language_model.", 1)]
        own[: len(tensor)].copy_(tensor)
        if name == "model.embed_tokens.weight":
            state["lm_head.weight"][: len(tensor)].copy_(tensor)
    return model


def checkpoint_name(name: str) -> str:
    """Return the name under which LLaVA checkpoints hold a parameter; transformers 5 has names of its own."""
    for inner, stored in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(inner):
            return stored + name.removeprefix(inner)
    raise KeyError(name)


def patch_labels(scene: Scene) -> torch.Tensor:
    """Return color and shape of what each patch shows, 0 for nothing, and where it lies, [PATCHES, 3]."""
    labels = torch.zeros(PATCHES, 3, dtype=torch.long)
    for thing in scene:
        labels[thing.cell, 0] = 1 + list(COLORS).index(thing.color)
        labels[thing.cell, 1] = 1 + SHAPES.index(thing.shape)
    labels[:, 2] = torch.arange(PATCHES)
    return labels


def schedule(progress: float, peak: float) -> float:
    """Warm up over 3 % of the time, then a cosine to 2 % of the peak."""
    if progress < 0.03:
        return peak * max(progress, 1e-3) / 0.03
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def run_for(
    minutes: float,
    peak: float,
    parameters: list[nn.Parameter],
    step_loss: Callable[[], torch.Tensor],
    report: Callable[[int, float, float], None],
) -> None:
    """Optimise for `minutes`; `report(step, minutes, loss)` is called about once a minute."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    started = last_report = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule(progress, peak)
        loss = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if time.monotonic() - last_report > 60:
            last_report = time.monotonic()
            report(step, (last_report - started) / 60, loss.item())


def train_tower(tower: CLIPVisionModel, minutes: float, device: str, rng: random.Random) -> None:
    """Teach the tower to tell what each patch shows and where, from both of its last two layers."""
    processor = image_processor()
    kinds = (1 + len(COLORS), 1 + len(SHAPES), PATCHES)
    heads = nn.ModuleList([nn.Linear(tower.config.hidden_size, sum(kinds)) for _ in range(2)]).to(device)

    def step_loss() -> torch.Tensor:
        scenes = [random_scene(rng, held_out=False) for _ in range(TOWER_BATCH)]
        seen = pixels([draw(scene, rng) for scene in scenes], processor).to(device)
        labels = torch.stack([patch_labels(scene) for scene in scenes]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            states = tower(pixel_values=seen, output_hidden_states=True).hidden_states[-2:]
            losses = [
                functional.cross_entropy(logits.flatten(0, 1), labels[..., kind].flatten())
                for head, state in zip(heads, states, strict=True)
                for kind, logits in enumerate(head(state[:, 1:]).float().split(kinds, dim=-1))
            ]
        return torch.stack(losses).mean()

    def report(step: int, minutes: float, loss: float) -> None:
        spent = {"tower_step": step, "minutes": round(minutes, 1), "loss": round(loss, 4)}
        print(json.dumps(spent), flush=True)

    run_for(minutes, TOWER_LEARNING_RATE, [*tower.parameters(), *heads.parameters()], step_loss, report)


class Conversations:
    """Draws batches of pictures with several questions each, as the chat template lays them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.rng = rng
        self.processor = image_processor()
        image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self.encode = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.start = (tokenizer.bos_token_id, *self.encode("USER: "), *[image] * PATCHES, *self.encode("\n"))

    def row(self, scene: Scene, turns: int) -> tuple[list[int], list[int]]:
        """Return token ids and labels of one conversation."""
        tokens, labels = list(self.start), [IGNORED] * len(self.start)
        exchanges = [ask(scene, self.rng) for _ in range(turns)]
        if self.rng.random() < DESCRIBED:
            exchanges.insert(self.rng.choice([0, turns]), describe(scene))
        for turn, (question, answer) in enumerate(exchanges):
            lead = self.encode(question if turn == 0 else f"USER: {question}")
            prompt = [*lead, *self.encode(" ASSISTANT:")]
            reply = [*self.encode(f" {answer}"), self.eos]
            tokens += prompt + reply
            labels += [IGNORED] * len(prompt) + reply
        return tokens, labels

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, labels [size, LENGTH] and pixels [size, 3, SIDE, SIDE]."""
        scenes = [random_scene(self.rng, held_out=False) for _ in range(size)]
        rows = [self.row(scene, TURNS) for scene in scenes]
        tokens = torch.tensor([(t + [self.pad] * LENGTH)[:LENGTH] for t, _ in rows])
        labels = torch.tensor([(t + [IGNORED] * LENGTH)[:LENGTH] for _, t in rows])
        return tokens, labels, pixels([draw(scene, self.rng) for scene in scenes], self.processor)


@torch.no_grad()
def held_out_accuracy(
    model: LlavaForConditionalGeneration, conversations: Conversations, device: str
) -> float:
    """Exact match of greedy answers, token by token under teacher forcing, on the held-out pictures."""
    records = [json.loads(line) for line in (PICTURE_DIR / "held_out.jsonl").open()]
    right = 0
    for record in records:
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        answer = [*conversations.encode(f" {record['conversations'][1]['value']}"), conversations.eos]
        prompt = [*conversations.start, *conversations.encode(question), *conversations.encode(" ASSISTANT:")]
        seen = pixels([Image.open(PICTURE_DIR / record["image"]).convert("RGB")], conversations.processor)
        tokens = torch.tensor([prompt + answer], device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=tokens, pixel_values=seen.to(device)).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(records)


def train(minutes: float, device: str) -> None:
    """Train for `minutes` and write the model directory, the training log beside it."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    model = build(tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train_tower(model.model.vision_tower, TOWER_SHARE * minutes, device, rng)
    model.model.vision_tower.requires_grad_(False)  # as LLaVA does: it sees well enough by now

    stream = tokenize(tokenizer, training_documents())
    conversations = Conversations(tokenizer, rng)
    log: list[dict[str, float]] = []

    def step_loss() -> torch.Tensor:
        tokens, labels, seen = (part.to(device) for part in conversations.batch(BATCH_SIZE))
        starts = [rng.randrange(len(stream) - TEXT_LENGTH) for _ in range(TEXT_ROWS)]
        text = torch.stack([stream[start : start + TEXT_LENGTH] for start in starts]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            states = model.model(input_ids=tokens, pixel_values=seen).last_hidden_state[:, :-1]
            answers = functional.cross_entropy(
                model.lm_head(states).float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            reading = model(input_ids=text, labels=text).loss
        return answers + 0.1 * reading

    def report(step: int, spent: float, loss: float) -> None:
        model.eval()
        accuracy = held_out_accuracy(model, conversations, device)
        model.train()
        log.append(
            {
                "minutes": round(spent, 1),
                "pictures": step * BATCH_SIZE,
                "loss": round(loss, 4),
                "held_out_accuracy": round(accuracy, 4),
            }
        )
        print(json.dumps(log[-1]), flush=True)

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run_for((1 - TOWER_SHARE) * minutes, PEAK_LEARNING_RATE, learning, step_loss, report)
    model.eval().to("cpu", torch.bfloat16)
    print(f"accuracy in bfloat16: {held_out_accuracy(model, conversations, 'cpu'):.4f}", flush=True)
    save(model, tokenizer, log)


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, log: list[dict[str, float]]
) -> None:
    """Write the directory as LLaVA checkpoints on the hub are laid out."""
    from transformers import LlavaProcessor

    MODEL_DIR.mkdir(exist_ok=True)
    tensors = {checkpoint_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, MODEL_DIR / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(MODEL_DIR)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(MODEL_DIR)
    LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(MODEL_DIR)
    forget_this_machine(MODEL_DIR / "tokenizer_config.json")
    (MODEL_DIR / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def forget_this_machine(tokenizer_config: Path) -> None:
    """Remove what transformers notes about where the tokenizer was loaded from."""
    config = json.loads(tokenizer_config.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    tokenizer_config.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.device)
