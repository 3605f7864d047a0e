"""Kinds of tokens, as a processor tells them apart, stay with their tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ercsvd_deploy.data.chat import load_processor
from ercsvd_deploy.data.conversations import read_conversations
from ercsvd_deploy.data.pictures import calibration_samples, question_samples
from ercsvd_deploy.data.records import read_record
from ercsvd_deploy.data.samples import Sample, make_batches
from ercsvd_deploy.data.texts import CalibrationError
from tests.families.shown import conversation_file
from tests.families.tiny_vision_families import save_tiny_family
from tests.families.vision_processors import FEATURES, make_processor, token_id
from tests.families.without_videos import leave_out_videos

MODEL = {"image_token_id": token_id("image"), "vocab_size": 300}


def test_types_are_cut_and_continued_with_the_tokens() -> None:
    sample = Sample(torch.arange(5), token_types={"types": torch.tensor([0, 1, 1, 0, 0])})
    assert sample.cut(3).token_types["types"].tolist() == [0, 1, 1]
    continued = sample.continued([7, 8])
    assert continued.tokens.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert continued.token_types["types"].tolist() == [0, 1, 1, 0, 0, 0, 0]


def test_batches_have_types_row_by_row() -> None:
    samples = [
        Sample(torch.full((4,), row), token_types={} if row == 1 else {"types": torch.full((4,), row)})
        for row in range(4)
    ]
    batches = {batch.rows: batch for batch in make_batches(samples, 64)}
    assert set(batches) == {(0, 2, 3), (1,)}
    assert batches[0, 2, 3].token_types["types"][:, 0].tolist() == [0, 2, 3]
    inputs = batches[0, 2, 3].model_inputs(torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["types"], inputs["input_ids"])


def test_gemma3_samples_and_questions_say_where_pictures_are(tmp_path: Path) -> None:
    processor = make_processor("gemma3")
    conversations = read_conversations(conversation_file(tmp_path))
    drawn = calibration_samples(
        conversations, processor, num_samples=4, sequence_length=40, seed=0, **MODEL
    ).samples
    asked = [each.sample for each in question_samples(conversations, processor, **MODEL).questions]
    for sample in [*drawn, *asked]:
        [types] = sample.token_types.values()
        assert torch.equal(types == 1, sample.tokens == MODEL["image_token_id"])
        assert int(types.sum()) == FEATURES
    assert {len(sample.tokens) for sample in drawn} == {40}


def test_videos_are_refused() -> None:
    record = {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}
    with pytest.raises(CalibrationError, match="videos cannot be used, pictures can"):
        read_record(
            record | {"image": "a.png"},
            "data.jsonl: 3",
            image_field="image",
            conversation_field=None,
            image_of=lambda value, where: pytest.fail(f"{where}: {value}"),
        )


@pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="says what to do where torchvision is missing"
)
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_videos(patch)
        save_tiny_family(tmp_path, "qwen3_vl")
    with pytest.raises(CalibrationError, match="several processors need torchvision: install it"):
        load_processor(str(tmp_path))
