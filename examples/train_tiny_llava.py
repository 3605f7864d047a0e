"""Train a tiny vision-language model: a small tower in front of the embedded Llama.

As LLaVA was made from parts that could already see and read, so is this one. First the tower learns
alone, from scratch, to say what each patch of a picture shows and where it lies. Then it is frozen, and
projector and language model learn to answer questions and to describe (see `make_pictures.py`), with Python
source mixed in so that the model can still read. Loss is taken on the answers only. No held-out scene is
drawn for training.

Run `python examples/train_tiny_llava.py --minutes 50` for the embedded one, with a tower like CLIP's; the
learning rate follows the clock. Another tower in front of the embedded one's language model, which knows how
to answer already, needs less: tower and projector then also learn to give what the embedded ones give. How
many minutes that takes has not been measured yet.

    python examples/train_tiny_llava.py --tower siglip --start examples/tiny-llava --minutes 8 --output DIR
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

import torch
from make_pictures import COLORS, PICTURE_DIR, SHAPES, Scene, ask, describe, draw, random_scene
from make_texts import training_documents
from PIL import Image
from tiny_llava_model import EXAMPLES, IMAGE_TOKEN, PATCHES, TOWERS, Tower, build, make_tokenizer, save
from torch import nn
from torch.nn import functional
from train_tiny_llama import tokenize
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

TURNS = 5
DESCRIBED = 0.5  # share of the conversations that have a full description as their first or last turn
TOWER_BATCH = 128
BATCH_SIZE = 16  # conversations in a step
# Rows are padded to one length: on a CPU every new shape of a matrix product costs more than the product.
LENGTH = 192
TEXT_ROWS = 2  # rows of Python source in a step
TEXT_LENGTH = 128
TOWER_LEARNING_RATE = 1e-3
# Share of the minutes for the tower, and the peak of the learning rate behind it: of a language model that
# never saw a picture, and of one that answers already.
FROM_A_READER = (0.04, 6e-4)
FROM_A_SEER = (0.4, 3e-4)
SEED = 5
IGNORED = -100


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


class Teacher:
    """A LLaVA whose features of pictures are to be imitated."""

    def __init__(self, directory: Path, device: str) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).to(device)
        own = self.model.config.vision_config.model_type
        self.tower = next(tower for tower in TOWERS.values() if tower.config.model_type == own)

    @torch.no_grad()
    def features(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Return what its language model gets to see, [n, PATCHES, hidden]."""
        seen = self.tower.pixels(pictures).to(self.model.device, torch.bfloat16)
        return torch.stack(self.model.model.get_image_features(pixel_values=seen).pooler_output).float()


def train_tower(
    model: LlavaForConditionalGeneration,
    tower: Tower,
    teacher: Teacher | None,
    minutes: float,
    device: str,
    rng: random.Random,
) -> None:
    """Teach the tower to tell what each patch shows and where, from both of its last two layers.

    Beside a teacher, tower and projector learn its features too: loss is their mean squared error, as a share
    of the features' variance.
    """
    kinds = (1 + len(COLORS), 1 + len(SHAPES), PATCHES)
    seeing = model.model.vision_tower
    heads = nn.ModuleList([nn.Linear(tower.config.hidden_size, sum(kinds)) for _ in range(2)]).to(device)
    learning = [*seeing.parameters(), *heads.parameters()]
    if teacher is not None:
        learning += model.model.multi_modal_projector.parameters()

    def step_loss() -> torch.Tensor:
        scenes = [random_scene(rng, held_out=False) for _ in range(TOWER_BATCH)]
        pictures = [draw(scene, rng) for scene in scenes]
        seen = tower.pixels(pictures).to(device)
        labels = torch.stack([patch_labels(scene) for scene in scenes]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            states = [
                state[:, tower.num_class_tokens :]
                for state in seeing(pixel_values=seen, output_hidden_states=True).hidden_states[-2:]
            ]
            losses = [
                functional.cross_entropy(logits.flatten(0, 1), labels[..., kind].flatten())
                for head, state in zip(heads, states, strict=True)
                for kind, logits in enumerate(head(state).float().split(kinds, dim=-1))
            ]
            loss = torch.stack(losses).mean()
            if teacher is not None:
                wanted = teacher.features(pictures)
                given = model.model.multi_modal_projector(states[0]).float()
                loss = loss + functional.mse_loss(given, wanted) / wanted.var()
        return loss

    def report(step: int, minutes: float, loss: float) -> None:
        spent = {"tower_step": step, "minutes": round(minutes, 1), "loss": round(loss, 4)}
        print(json.dumps(spent), flush=True)

    run_for(minutes, TOWER_LEARNING_RATE, learning, step_loss, report)


class Conversations:
    """Draws batches of pictures with several questions each, as the chat template lays them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tower: Tower, rng: random.Random) -> None:
        self.rng = rng
        self.tower = tower
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
        return tokens, labels, self.tower.pixels([draw(scene, self.rng) for scene in scenes])


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
        seen = conversations.tower.pixels([Image.open(PICTURE_DIR / record["image"]).convert("RGB")])
        tokens = torch.tensor([prompt + answer], device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=tokens, pixel_values=seen.to(device)).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(records)


def train(tower: Tower, start: Path, minutes: float, device: str, directory: Path) -> None:
    """Train for `minutes`, starting from the language model of `start`, and write the model directory."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = make_tokenizer()
    model = build(tower, start, tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    can_see = json.loads((start / "config.json").read_text())["model_type"] == LlavaConfig.model_type
    teacher = Teacher(start, device) if can_see else None
    tower_share, peak = FROM_A_SEER if can_see else FROM_A_READER
    train_tower(model, tower, teacher, tower_share * minutes, device, rng)
    model.model.vision_tower.requires_grad_(False)  # as LLaVA does: it sees well enough by now

    stream = tokenize(tokenizer, training_documents())
    conversations = Conversations(tokenizer, tower, rng)
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
    run_for((1 - tower_share) * minutes, peak, learning, step_loss, report)
    model.eval().to("cpu", torch.bfloat16)
    print(f"accuracy in bfloat16: {held_out_accuracy(model, conversations, 'cpu'):.4f}", flush=True)
    save(model, tower, tokenizer, log, directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", choices=TOWERS, default="clip")
    parser.add_argument(
        "--start",
        type=Path,
        default=EXAMPLES / "tiny-llama",
        help="whose language model to start from, this one's or examples/tiny-llava's",
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path, default=EXAMPLES / "tiny-llava")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(TOWERS[arguments.tower], arguments.start, arguments.minutes, arguments.device, arguments.output)
