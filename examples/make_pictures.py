"""Draw the example pictures and ask questions about them: what the embedded LLaVA learns, and is judged by.

A picture shows one to four objects on a three-by-three grid: shapes and colors, counts and positions,
everything a question can be answered from by looking. Pictures are told apart by their contents: a tenth of
all possible contents is held out, so no held-out picture was ever trained on in any drawing of it.

Run `python examples/make_pictures.py`; it writes `examples/pictures/` with `calibration.jsonl` (LLaVA's
conversation format, several turns a picture) and `held_out.jsonl` (one question a picture).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

PICTURE_DIR = Path(__file__).parent / "pictures"
SIDE = 96
CELL = SIDE // 3
_OVERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
MOST_OBJECTS = 4
NUM_CALIBRATION = 256
NUM_HELD_OUT = 320
TURNS = 6
SEED = 3


@dataclass(frozen=True, order=True)
class Thing:
    """One object: where it is and what it looks like."""

    cell: int  # 0..8, row by row
    color: str
    shape: str

    @property
    def name(self) -> str:
        """What it is called in questions and answers."""
        return f"{self.color} {self.shape}"


Scene = tuple[Thing, ...]


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the tenth of all scenes that is never trained on."""
    text = ";".join(f"{thing.cell} {thing.name}" for thing in sorted(scene))
    return hashlib.sha256(text.encode()).digest()[0] < 26


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw a scene; `held_out` says from which part."""
    while True:
        cells = rng.sample(range(9), rng.randint(1, MOST_OBJECTS))
        scene = tuple(Thing(cell, rng.choice(tuple(COLORS)), rng.choice(SHAPES)) for cell in sorted(cells))
        if is_held_out(scene) == held_out:
            return scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Return a picture [SIDE x SIDE, RGB]; shade, size, place within the cell and tilt are random."""
    shade = rng.randint(0, 90)
    background = tuple(max(0, min(255, shade + rng.randint(-12, 12))) for _ in range(3))
    image = Image.new("RGB", (SIDE * _OVERSAMPLING, SIDE * _OVERSAMPLING), background)
    pen = ImageDraw.Draw(image)
    for thing in scene:
        radius = rng.uniform(0.28, 0.42) * CELL
        slack = CELL / 2 - radius
        x = (thing.cell % 3 + 0.5) * CELL + rng.uniform(-slack, slack)
        y = (thing.cell // 3 + 0.5) * CELL + rng.uniform(-slack, slack)
        color = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLORS[thing.color])
        if thing.shape == "circle":
            box = [(c + s * radius) * _OVERSAMPLING for s in (-1, 1) for c in (x, y)]
            pen.ellipse(box, fill=color)
        else:
            outline = _outline(thing.shape, x, y, radius, rng.uniform(-0.2, 0.2))
            pen.polygon([(px * _OVERSAMPLING, py * _OVERSAMPLING) for px, py in outline], fill=color)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _outline(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """Return the corners of a polygon around (x, y)."""
    corners = {"triangle": 3, "square": 4, "star": 10}[shape]
    start = tilt - math.pi / 2 + (math.pi / 4 if shape == "square" else 0)
    return [
        (
            x + (far := radius * (0.42 if shape == "star" and i % 2 else 1)) * math.cos(a),
            y + far * math.sin(a),
        )
        for i, a in enumerate(start + 2 * math.pi * i / corners for i in range(corners))
    ]


def describe(scene: Scene) -> tuple[str, str]:
    """Return the request to describe a scene, and a full description, object by object."""
    things = (f"a {thing.name} in the {POSITIONS[thing.cell]}" for thing in scene)
    return "Describe the picture.", ", ".join(things)


def ask(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question that the scene answers, and the answer."""
    questions = (_ask_total, _ask_count, _ask_color, _ask_shape, _ask_position, _ask_contents, _ask_presence)
    while (asked := rng.choice(questions)(scene, rng)) is None:
        pass  # not every question suits every scene: "the" star must be the only one
    return asked


def _ask_total(scene: Scene, _rng: random.Random) -> tuple[str, str] | None:
    return "How many objects are there?", str(len(scene))


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        shape = rng.choice([*SHAPES, *(thing.shape for thing in scene)])
        return f"How many {shape}s are there?", str(sum(thing.shape == shape for thing in scene))
    color = rng.choice([*COLORS, *(thing.color for thing in scene)])
    return f"How many {color} objects are there?", str(sum(thing.color == color for thing in scene))


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _only(scene, rng, lambda thing: thing.shape)
    return thing and (f"What color is the {thing.shape}?", thing.color)


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _only(scene, rng, lambda thing: thing.color)
    return thing and (f"What shape is the {thing.color} object?", thing.shape)


def _ask_position(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    thing = _only(scene, rng, lambda thing: thing.name)
    return thing and (f"Where is the {thing.name}?", POSITIONS[thing.cell])


def _ask_contents(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    there = {thing.cell: f"a {thing.name}" for thing in scene}
    cell = rng.choice([*there, *there, rng.randrange(9)])
    return f"What is in the {POSITIONS[cell]}?", there.get(cell, "nothing")


def _ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    there = {thing.name for thing in scene}
    if rng.random() < 0.5:
        name = rng.choice(sorted(there))
    else:  # a colour and a shape that are often both there, but not together
        colors = [*COLORS, *(thing.color for thing in scene for _ in range(3))]
        shapes = [*SHAPES, *(thing.shape for thing in scene for _ in range(3))]
        name = f"{rng.choice(colors)} {rng.choice(shapes)}"
    return f"Is there a {name}?", "yes" if name in there else "no"


def _only(scene: Scene, rng: random.Random, look: Callable[[Thing], str]) -> Thing | None:
    """Return a thing that no other one of the scene looks like, if there is one."""
    looks = [look(thing) for thing in scene]
    alone = [thing for thing in scene if looks.count(look(thing)) == 1]
    return rng.choice(alone) if alone else None


def write_conversations(
    directory: Path, name: str, rng: random.Random, *, count: int, turns: int, held_out: bool
) -> Path:
    """Write pictures and conversations about them; return the conversations' file, `directory/name.jsonl`."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.jsonl").open("w") as file:
        for index in range(count):
            scene = random_scene(rng, held_out=held_out)
            draw(scene, rng).save(folder / f"{index:04d}.png", optimize=True)
            conversation = []
            for turn in range(turns):
                question, answer = ask(scene, rng)
                conversation += [
                    {"from": "human", "value": question if turn else f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ]
            record = {
                "id": f"{name}-{index:04d}",
                "image": f"{name}/{index:04d}.png",
                "conversations": conversation,
            }
            file.write(json.dumps(record) + "\n")
    return directory / f"{name}.jsonl"


def main() -> None:
    """Write the calibration and held-out pictures with their conversations."""
    rng = random.Random(SEED)
    write_conversations(PICTURE_DIR, "calibration", rng, count=NUM_CALIBRATION, turns=TURNS, held_out=False)
    write_conversations(PICTURE_DIR, "held_out", rng, count=NUM_HELD_OUT, turns=1, held_out=True)


if __name__ == "__main__":
    main()
