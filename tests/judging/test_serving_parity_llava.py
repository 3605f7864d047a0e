"""Serving parity with pictures, without vLLM: which are shown, as what, and how answers are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.exporters.vllm.engines.process import ServedPrompt
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from tests.judging.vllm_stand_in import StandIn
from tests.recipe_runs import TEXT, RecipeWriter, invoke
from tests.tiny_vision import NUM_PATCHES

pytestmark = pytest.mark.slow  # whole runs

GATES = {"serving_parity": 0.05, "built_in_text": False}


class WithPictures(StandIn):
    """In vLLM's place: puts image features where image tokens stand, and computes with transformers."""

    @torch.no_grad()
    def answer(self, model: str, prompts: Sequence[ServedPrompt], num_decoded: int) -> list[dict[str, Any]]:
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(model)
        outputs = []
        for prompt in prompts:
            repeated = {processor.image_token_id: NUM_PATCHES}
            start = [token for token in prompt.tokens for _ in range(repeated.get(token, 1))]
            inputs = {}
            if prompt.pictures:
                made = processor.image_processor(images=list(prompt.pictures), return_tensors="pt")
                inputs = {"pixel_values": made["pixel_values"]}
            tokens = list(start)
            for _ in range(num_decoded):
                tokens.append(int(loaded(torch.tensor([tokens]), **inputs).logits[0, -1].argmax()))
            logprobs = loaded(torch.tensor([tokens]), **inputs).logits[0].log_softmax(-1)
            found = logprobs[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].tolist()
            border = len(start) - 1
            outputs.append(
                {
                    "prompt": start,
                    "prompt_logprobs": found[:border],
                    "decoded": tokens[len(start) :],
                    "decoded_logprobs": found[border:],
                }
            )
        return outputs


class Misreading(WithPictures):
    """Reads the last prompt, which is about a picture, with another token in its place."""

    def answer(self, model: str, prompts: Sequence[ServedPrompt], num_decoded: int) -> list[dict[str, Any]]:
        outputs = super().answer(model, prompts, num_decoded)
        outputs[-1]["prompt"] = [outputs[-1]["prompt"][0] + 1, *outputs[-1]["prompt"][1:]]
        return outputs


def with_texts(path: Path, **evaluation: Any) -> Path:
    recipe = yaml.safe_load(path.read_text())
    recipe["gates"] = GATES
    recipe["evaluation"] = {
        "perplexity": {"held_out": str(TEXT / "in_domain.txt")},
        "max_sequences": 2,
        **evaluation,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("source", ["questions", "calibration"])
def test_pictures_are_compared_like_texts(
    source: str,
    write_picture_recipe: RecipeWriter,
    in_place_of_vllm: Callable[..., StandIn],
    pictures: Path,
    tmp_path: Path,
) -> None:
    vllm = in_place_of_vllm(WithPictures())
    dataset = {"conversations": str(pictures / "conversations.jsonl")}
    questions = {"visual_questions": {"noise": {"dataset": dataset}}} if source == "questions" else {}
    code, out, _ = invoke("run", with_texts(write_picture_recipe(), **questions))
    assert code == 0
    shown = [prompt for prompt in vllm.asked[0]["prompts"] if prompt.pictures]
    assert len(shown) == 8
    assert vllm.asked[0]["limit_mm_per_prompt"] == {"image": 1, "video": 0}
    assert len({picture.tobytes() for prompt in shown for picture in prompt.pictures}) == 8
    serving = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["serving"]
    texts, images = serving["sizes"][0]["agreements"]
    assert (texts["subject"], images["subject"]) == ("texts", "pictures")
    assert images["num_prompts"] == 8
    assert images["decoded"]["num_tokens"] == 8 * 16
    assert images["greedy_agreeing"] == 8 * 16
    text_tokens = sum(len(prompt.tokens) - 2 for prompt in shown)  # neither the first nor the picture's
    assert images["prompt"]["num_tokens"] == text_tokens
    assert images["together"]["largest"] < 1e-3
    assert serving["mean_difference"] < 1e-3
    assert "128 of 128" in out


def test_other_tokens_than_ours_are_a_failure(
    write_picture_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn], pictures: Path
) -> None:
    in_place_of_vllm(Misreading())
    dataset = {"conversations": str(pictures / "conversations.jsonl")}
    code, _, err = invoke(
        "run", with_texts(write_picture_recipe(), visual_questions={"noise": {"dataset": dataset}})
    )
    assert code == 3
    assert "vLLM reads a prompt about pictures as" in err


def test_without_pictures_it_is_said(
    write_picture_recipe: RecipeWriter, in_place_of_vllm: Callable[..., StandIn]
) -> None:
    vllm = in_place_of_vllm(WithPictures())
    path = with_texts(write_picture_recipe())
    recipe = yaml.safe_load(path.read_text())
    del recipe["vision"]
    path.write_text(yaml.safe_dump(recipe))
    code, out, _ = invoke("run", path)
    assert code == 0
    assert "gates.serving_parity is measured on texts alone" in out
    assert not [prompt for prompt in vllm.asked[0]["prompts"] if prompt.pictures]
