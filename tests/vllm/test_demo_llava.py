"""The embedded LLaVA by the demo's recipe, behind OpenAI's API: it says what transformers' model says."""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of the reference
from ercsvd_deploy.models.compressed.modules import PackedLinear
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.forks import REPOSITORY
from tests.vllm.engines import serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PICTURES = REPOSITORY / "examples" / "pictures"
NUM_QUESTIONS = 64
MOST_TOKENS = 16
# The demo's own settings but for its length.
SHORTER = (
    "calibration.num_samples=96",
    "stages.0.factorize.num_compressed_layers=all",
    f"evaluation={{visual_questions: {{q: {{dataset: {{conversations: {PICTURES}/held_out.jsonl}},"
    f" max_questions: {NUM_QUESTIONS}}}}}}}",
)


def transformers_answer(model: torch.nn.Module, processor: object, picture: Path, question: str) -> str:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}],
        }
    ]
    inputs = processor.apply_chat_template(  # type: ignore[attr-defined]
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)  # type: ignore[operator]
    said = tokens[0, inputs["input_ids"].shape[1] :]
    answer: str = processor.tokenizer.decode(said, skip_special_tokens=True)  # type: ignore[attr-defined]
    return answer.strip()


def test_served_answers_about_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe(REPOSITORY / "recipes/demo-llava.yaml", SHORTER, tmp_path / "export")
    report, directory = run_recipe(recipe)
    lines = (PICTURES / "held_out.jsonl").read_text().splitlines()[:NUM_QUESTIONS]
    asked = [json.loads(line) for line in lines]
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, PackedLinear):  # once, not for every token
            monkeypatch.setattr(module, "dequantize", partial(Tensor.detach, module.dequantize()))
    processor = AutoProcessor.from_pretrained(directory)
    same = right = 0
    with serving(
        directory,
        tmp_path / "server.log",
        "--enforce-eager",
        PYTHONPATH=str(REPOSITORY / "examples/without_torchvision"),
    ) as post:
        for record in asked:
            picture = PICTURES / record["image"]
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            request = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
            said = post("chat/completions", request | {"max_tokens": MOST_TOKENS})["message"]["content"]
            same += said.strip() == transformers_answer(model, processor, picture, question)
            right += said.strip() == record["conversations"][1]["value"]
    assert same / NUM_QUESTIONS >= 0.98
    # What is served is as good as what was reported.
    assert right / NUM_QUESTIONS == pytest.approx(report.compressed.exact_match["q"], abs=0.04)
