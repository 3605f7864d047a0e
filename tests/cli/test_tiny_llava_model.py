"""The tiny LLaVAs of the examples: what is trained, what is written and what transformers reads are one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the example as a module; it imports its neighbours as scripts do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "tiny_llava_model", raising=False)
    import tiny_llava_model  # type: ignore[import-not-found]

    return tiny_llava_model


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("start", ["tiny-llama", "tiny-llava"])
@torch.no_grad()
def test_transformers_sees_and_says_what_was_trained(
    kind: str, start: str, made: Any, tmp_path: Path
) -> None:
    tower, tokenizer = made.TOWERS[kind], made.make_tokenizer()
    model = made.build(tower, EXAMPLES / start, tokenizer).eval()
    made.save(model, tower, tokenizer, [], tmp_path)

    processor = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.open(EXAMPLES / "pictures/held_out/0000.png").convert("RGB")
    parts = [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    asked = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=asked, images=picture, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], tower.pixels([picture]))
    assert inputs["input_ids"].tolist()[0].count(processor.image_token_id) == made.PATCHES

    read = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(read(**inputs).logits, model(**inputs).logits)
    of_start = dict(made.language_model(EXAMPLES / start))
    now = read.state_dict()
    assert len(of_start) == len([name for name in now if "language_model" in name or "lm_head" in name])
    assert all(torch.equal(now[name][: len(tensor)], tensor) for name, tensor in of_start.items())
