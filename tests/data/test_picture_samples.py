"""Conversations become the sequences that the processor itself makes, answers what is to be generated."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ercsvd_deploy.data.conversations import Conversation, Turn, read_conversations
from ercsvd_deploy.data.images import ImageContent, ImageFile
from ercsvd_deploy.data.pictures import (
    PictureQuestions,
    PictureSamples,
    calibration_samples,
    load_processor,
    picture_prompts,
    question_samples,
)
from ercsvd_deploy.data.texts import CalibrationError

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llava"
IMAGE, VOCABULARY = 4096, 4097
PATCHES = 9


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(str(MODEL))


@pytest.fixture(scope="module")
def conversations() -> Sequence[Conversation]:
    return read_conversations(EXAMPLES / "pictures" / "calibration.jsonl")


@pytest.fixture(scope="module")
def held_out() -> Sequence[Conversation]:
    return read_conversations(EXAMPLES / "pictures" / "held_out.jsonl")


def draw(conversations: Sequence[Conversation], processor: Any, **options: Any) -> PictureSamples:
    defaults = {"num_samples": len(conversations), "sequence_length": 1000, "seed": 0}
    model = {"image_token_id": IMAGE, "vocab_size": VOCABULARY}
    return calibration_samples(conversations, processor, **defaults | model | options)


def ask(conversations: Sequence[Conversation], processor: Any, **options: Any) -> PictureQuestions:
    model = {"image_token_id": IMAGE, "vocab_size": VOCABULARY}
    return question_samples(conversations, processor, **model | options)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def talk(*turns: Turn, where: str = "talk", images: Sequence[Image.Image] | None = None) -> Conversation:
    count = sum(turn.num_images for turn in turns)
    shown = [picture(seed=index) for index in range(count)] if images is None else images
    return Conversation(where, turns, tuple(ImageContent(where, image) for image in shown))


def about(question: str = "What is it?", answer: str = "a star", **options: Any) -> Conversation:
    return talk(Turn("user", question, 1), Turn("assistant", answer), **options)


def damaged(where: str) -> Conversation:
    return Conversation(where, about().turns, (ImageFile(Path("nowhere") / where),))


def with_template(processor: Any, template: str) -> Any:
    changed = copy.copy(processor)
    changed.chat_template = template
    return changed


def naively_encoded(processor: Any, conversation: Conversation, num_turns: int, **options: Any) -> Any:
    """Let the processor do everything: template, tokens and pictures in one call of its own."""
    images = iter([source.open() for source in conversation.images])
    messages = []
    for turn in conversation.turns[:num_turns]:
        content: list[dict[str, object]] = [
            {"type": "image", "image": next(images)} for _ in range(turn.num_images)
        ]
        messages.append({"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]})
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


# ---- calibration


def test_samples_are_what_the_processor_makes(processor: Any, conversations: Sequence[Conversation]) -> None:
    found = draw(conversations, processor, num_samples=20, seed=3)
    order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(3))[:20]
    assert (len(found.samples), found.damaged, found.too_long) == (20, (), 0)
    assert found.warnings("field") == []
    for sample, index in zip(found.samples, order.tolist(), strict=True):
        expected = naively_encoded(processor, conversations[index], 12)
        assert torch.equal(sample.tokens, expected["input_ids"][0])
        assert set(sample.images) == {"pixel_values"}
        assert torch.equal(sample.images["pixel_values"], expected["pixel_values"])
        assert sample.token_weights is None


def test_the_seed_decides_what_is_drawn(processor: Any, conversations: Sequence[Conversation]) -> None:
    first, again, other = (
        [
            sample.tokens.tolist()
            for sample in draw(conversations, processor, num_samples=8, seed=seed).samples
        ]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(map(tuple, first))) == 8


def test_image_tokens_can_be_weighed(processor: Any) -> None:
    (sample,) = draw([about()], processor, token_weight=0.25).samples
    assert sample.token_weights is not None
    assert sample.token_weights.dtype == torch.float32
    assert sample.token_weights.tolist() == [0.25 if token == IMAGE else 1.0 for token in sample.tokens]
    assert int((sample.tokens == IMAGE).sum()) == PATCHES


def test_long_conversations_are_cut_but_never_within_images(processor: Any) -> None:
    short = about()
    (whole,) = draw([short], processor).samples
    last = int((whole.tokens == IMAGE).nonzero().max())
    (cut,) = draw([short], processor, sequence_length=last + 1, token_weight=2).samples
    assert torch.equal(cut.tokens, whole.tokens[: last + 1])
    assert cut.token_weights is not None
    assert cut.token_weights.shape == cut.tokens.shape
    with pytest.raises(CalibrationError, match=rf"no conversation can be used: 1 are too long for {last} "):
        draw([short], processor, sequence_length=last)
    later = talk(Turn("user", "One.", 1), Turn("assistant", "Yes."), Turn("user", "Two.", 1))
    found = draw([short, later, short], processor, sequence_length=last + 20)
    assert (len(found.samples), found.too_long) == (2, 1)
    assert found.warnings("f") == ["f: 1 left out because they are too long"]


def test_damaged_pictures_are_replaced_and_named(processor: Any) -> None:
    everything = [damaged(f"{index}.png") if index % 3 else about(f"Q{index}") for index in range(30)]
    found = draw(everything, processor, num_samples=5)
    assert len(found.samples) == 5
    assert all(line.endswith(".png: no such file") for line in found.damaged)
    assert len(found.damaged) == len(set(found.damaged)) > 0
    most = draw(everything, processor, num_samples=30)
    assert (len(most.samples), len(most.damaged)) == (10, 20)
    (line,) = most.warnings("vision.calibration")
    assert line.startswith("vision.calibration: 20 left out because a picture is damaged: nowhere/")
    assert line.endswith("; and 15 more")


def test_nothing_usable_is_an_error(processor: Any) -> None:
    with pytest.raises(CalibrationError, match=r"2 have a damaged picture \(the first: nowhere/.\.png: no"):
        draw([damaged("a.png"), damaged("b.png")], processor)
    with pytest.raises(CalibrationError, match=r"3 conversations with pictures are asked for, there are 2"):
        draw([about(), about()], processor, num_samples=3)
    with pytest.raises(CalibrationError, match=r"no conversation can be used: there are none"):
        draw([], processor)


def test_a_large_useless_dataset_is_given_up_early(processor: Any) -> None:
    with pytest.raises(CalibrationError, match="100 have a damaged picture"):
        draw([damaged(str(index)) for index in range(5000)], processor, num_samples=2)


def test_processor_and_model_have_to_belong_together(processor: Any) -> None:
    for use in (draw, ask):
        with pytest.raises(CalibrationError, match="talk: no token is the model's image token, 77"):
            use([about("hm")], processor, image_token_id=77)
        with pytest.raises(
            CalibrationError, match="produced token 4096, but the model's vocabulary has 4096"
        ):
            use([about()], processor, vocab_size=4096)


def test_image_tokens_in_texts_are_refused(processor: Any) -> None:
    for use in (draw, ask):
        with pytest.raises(CalibrationError, match=r"talk: 1 images, but 2 image tokens '<image>'"):
            use([about("What is <image>?")], processor)
    for answer in ("an <image> tag", "a</s>b"):
        with pytest.raises(CalibrationError, match=r"talk: the answer .* is no text that can be generated"):
            ask([about(answer=answer)], processor)


def test_templates_that_refuse_or_forget_images_are_named(processor: Any) -> None:
    for template, message in (
        ("{{ raise_exception('no system turns') }}", "talk: the chat template refuses it: no system turns"),
        ("{{ messages.nothing.there }}", "talk: the chat template refuses it"),
        ("{{ messages[0].content[1].text }}", "1 images, but 0 image tokens"),
    ):
        with pytest.raises(CalibrationError, match=message):
            draw([about()], with_template(processor, template))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 50), (1, 90), (500, 400)])
def test_pictures_of_any_size(processor: Any, size: tuple[int, int]) -> None:
    (sample,) = draw([about(images=[picture(*size)])], processor).samples
    assert sample.images["pixel_values"].shape == (1, 3, 96, 96)
    assert int((sample.tokens == IMAGE).sum()) == PATCHES


def test_pictures_the_processor_does_not_take_are_named(processor: Any) -> None:
    class Choosy(type(processor)):  # type: ignore[misc]
        def __call__(self, **inputs: Any) -> Any:
            if inputs["images"][0].width < 10:
                raise ValueError("too small")
            return super().__call__(**inputs)

    choosy = copy.copy(processor)
    choosy.__class__ = Choosy
    found = draw([about(images=[picture(5, 7)], where="here"), about()], choosy)
    assert len(found.samples) == 1
    assert found.damaged == ("here: the processor does not take its pictures (5 x 7 pixels): too small",)


# ---- LLaVA-NeXT: pictures of different shapes have different numbers of tokens


@pytest.fixture(scope="module")
def next_processor(processor: Any) -> Any:
    size = {"height": 32, "width": 32}
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
        ),
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
        num_additional_image_tokens=1,
    )


def test_llava_next_samples_fit_the_model(next_processor: Any) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    pinpoints = next_processor.image_processor.image_grid_pinpoints
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
        )
    ).eval()
    sizes = [(40, 30), (30, 90), (64, 64), (100, 20)]
    talks = [about(images=[picture(*size)]) for size in sizes]
    talks.append(talk(Turn("user", "Which?", 2), images=[picture(60, 20), picture(20, 60)]))
    found = draw(talks, next_processor)
    assert len(found.samples) == 5
    assert len({len(sample.tokens) for sample in found.samples}) > 2
    for sample in found.samples:
        assert set(sample.images) == {"pixel_values", "image_sizes"}
        with torch.no_grad():  # refuses tokens and features that differ in number
            logits = model(input_ids=sample.tokens[None], **sample.images).logits
        assert logits.isfinite().all()
    for question in ask(talks[:4], next_processor).questions:
        expected = naively_encoded(
            next_processor, talks[sizes.index(_size_of(question))], 1, add_generation_prompt=True
        )
        assert torch.equal(question.sample.tokens[: question.answer_start], expected["input_ids"][0])


def _size_of(question: Any) -> tuple[int, int]:
    height, width = question.sample.images["image_sizes"][0].tolist()
    return width, height


# ---- questions


def test_every_answer_is_a_question(processor: Any, conversations: Sequence[Conversation]) -> None:
    found = ask(conversations[:3], processor).questions
    records = [
        json.loads(line)
        for line in (EXAMPLES / "pictures" / "calibration.jsonl").read_text().splitlines()[:3]
    ]
    said = [turn["value"].removeprefix("<image>\n") for record in records for turn in record["conversations"]]
    assert [(question.question, question.answer) for question in found] == list(
        zip(said[::2], said[1::2], strict=True)
    )
    for number, question in enumerate(found):
        conversation, turn = conversations[number // 6], number % 6
        assert question.where == conversation.where
        prompt = naively_encoded(processor, conversation, 2 * turn + 1, add_generation_prompt=True)
        tokens, start = question.sample.tokens, question.answer_start
        assert torch.equal(tokens[:start], prompt["input_ids"][0])
        assert torch.equal(question.sample.images["pixel_values"], prompt["pixel_values"])
        assert processor.tokenizer.decode(tokens[start:]) == f" {question.answer}</s>"
        answered = naively_encoded(processor, conversation, 2 * turn + 2)
        assert torch.equal(tokens, answered["input_ids"][0])
    # Six questions about a picture do not hold it six times.
    assert found[0].sample.images is found[5].sample.images
    assert found[0].sample.images is not found[6].sample.images


def test_teacher_forcing_tells_what_greedy_decoding_gives(
    processor: Any, held_out: Sequence[Conversation]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    wrong = [
        replace(each, turns=(each.turns[0], Turn("assistant", answer)))
        for each in held_out[:6]
        for answer in ("no such thing", "a")
    ]
    outcomes = []
    for question in ask([*held_out[:12], *wrong], processor).questions:
        tokens, start = question.sample.tokens, question.answer_start
        with torch.no_grad():
            logits = model(input_ids=tokens[None], **question.sample.images).logits[0]
            generated = model.generate(
                tokens[None, :start], **question.sample.images, do_sample=False, max_new_tokens=12
            )
        is_right = logits[start - 1 : -1].argmax(-1).tolist() == tokens[start:].tolist()
        assert is_right == (generated[0, start:].tolist() == tokens[start:].tolist())
        outcomes.append(is_right)
    assert any(outcomes[:12])
    assert not any(outcomes[12:])


# How LLaVA's templates end an answer, and what stands in front of it: each is told apart by one tail.
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{{ m.content[-1].text }} [/INST]{% else %}{{ ' ' + m.content[-1].text + TAIL }}{% endif %}{% endfor %}"
)
SPACED = (
    "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}"
    "{{ m.role + ': ' + m.content[-1].text + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{{ m.content[-1].text | trim + '<pad>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}"
    "{{ m.role + ':' + m.content[-1].text + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:<think></think>' }}{% endif %}"
)

OTHER_CUE = (
    "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}"
    "{{ m.role + ' says: ' + m.content[-1].text + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reply"),
    [
        (LLAVA, [" a star", "</s>"]),
        (INSTRUCT.replace("TAIL", "eos_token"), [" a star", "</s>"]),
        (INSTRUCT.replace("TAIL", "' ' + eos_token + '\n'"), [" a star", "</s>"]),
        (INSTRUCT.replace("TAIL", r"'<\\s> '"), [" a star", "</s>"]),
        (INSTRUCT.replace("TAIL", "''"), [" a star", "</s>"]),
        (SPACED, ["a star", "</s>"]),
        (MARKED, ["a star", "<pad>"]),
        (THINKING, ["a star", "</s>"]),
        (OTHER_CUE, ["a star", "</s>"]),
    ],
    ids=[
        "llava",
        "eos",
        "spaced-eos",
        "misspelt-eos",
        "no-eos",
        "prompt-ends-in-space",
        "other-end",
        "thinking",
        "other-cue",
    ],
)
def test_answers_are_what_has_to_be_generated(processor: Any, template: str, reply: list[str]) -> None:
    changed = with_template(processor, template)
    tokenizer = processor.tokenizer
    asked = talk(
        Turn("user", "What is it?", 1),
        Turn("assistant", " a star\n"),
        Turn("user", "Where?"),
        Turn("assistant", "a star"),
    )
    for turn, question in enumerate(ask([asked], changed).questions):
        prompt = naively_encoded(changed, asked, 2 * turn + 1, add_generation_prompt=True)
        tokens, start = question.sample.tokens, question.answer_start
        assert torch.equal(tokens[:start], prompt["input_ids"][0])
        assert tokenizer.decode(tokens[start:-1]) == reply[0]
        assert tokenizer.decode(tokens[-1:]) == reply[1]
        assert question.answer == "a star"


def test_answers_begin_anew_where_tokens_would_merge(processor: Any) -> None:
    (question,) = ask([about(answer="star")], with_template(processor, SPACED)).questions
    before, after = question.sample.tokens[question.answer_start - 1 : question.answer_start + 1].tolist()
    merged = processor.tokenizer(" star")["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(before) == "Ġ"
    assert after not in merged[:1]


def test_questions_before_the_first_picture(processor: Any) -> None:
    late = talk(
        Turn("system", "Be brief."),
        Turn("user", "Hello?"),
        Turn("assistant", "Hello."),
        Turn("user", "What is it?", 1),
        Turn("assistant", "a star"),
        Turn("user", "Sure?"),
    )
    before, with_picture = ask([late], processor).questions
    assert dict(before.sample.images) == {}
    assert set(with_picture.sample.images) == {"pixel_values"}
    expected = naively_encoded(processor, late, 4, add_generation_prompt=True)["input_ids"][0]
    assert torch.equal(with_picture.sample.tokens[: with_picture.answer_start], expected)


def test_questions_that_cannot_be_asked(processor: Any) -> None:
    unanswered = talk(Turn("user", "What?", 1), where="file:9")
    with pytest.raises(CalibrationError, match="file:9: the conversation has no answer to compare with"):
        ask([about(), unanswered], processor)
    with pytest.raises(CalibrationError, match="talk: turn 2: the answer is empty"):
        ask([about(answer=" \n")], processor)
    found = ask([damaged("a.png"), about(), damaged("b.png")], processor)
    assert len(found.questions) == 1
    assert found.damaged == ("nowhere/a.png: no such file", "nowhere/b.png: no such file")
    with pytest.raises(CalibrationError, match="no question can be used: 1 have a damaged picture"):
        ask([damaged("a.png")], processor)
    with pytest.raises(CalibrationError, match="no question can be used: there are none"):
        ask([], processor)


def test_questions_can_be_limited(processor: Any, conversations: Sequence[Conversation]) -> None:
    every = ask(conversations[:2], processor).questions
    first = ask(conversations, processor, max_questions=7)
    assert [question.question for question in first.questions] == [each.question for each in every[:7]]
    length = len(every[2].sample.tokens)
    short = ask(conversations[:1], processor, max_tokens=length)
    assert (len(short.questions), short.too_long) == (3, 3)
    with pytest.raises(CalibrationError, match="no question can be used: 6 are too long for 5 tokens"):
        ask(conversations[:1], processor, max_tokens=5)


TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    [
        "</s>",
        "<image>",
        "ASSISTANT: yes</s>USER: ",
        "<pad> ",
        "{{ messages }}",
        "\u2028",
        "ercsvd-deploy-answer",
    ]
)


@settings(max_examples=150, deadline=None)
@given(question=TEXT, answer=TEXT, template=st.sampled_from(["", LLAVA, SPACED, MARKED]))
def test_any_text_is_asked_as_it_is_or_refused(
    question: str, answer: str, template: str, processor: Any
) -> None:
    used = with_template(processor, template) if template else processor
    asked = about(question, answer)
    try:
        (found,) = ask([asked], used).questions
        (sample,) = draw([asked], used).samples
    except CalibrationError:
        assert not answer.strip() or "<image>" in question + answer or "</s>" in answer or "<pad>" in answer
        return
    assert int((sample.tokens == IMAGE).sum()) == PATCHES
    prompt = naively_encoded(used, asked, 1, add_generation_prompt=True)["input_ids"][0]
    assert torch.equal(found.sample.tokens[: found.answer_start], prompt)
    reply = processor.tokenizer.decode(
        found.sample.tokens[found.answer_start : -1], clean_up_tokenization_spaces=False
    )
    assert reply.strip() == answer.strip()


def prompts(
    conversations: Sequence[Conversation], processor: Any, num_prompts: int, **options: Any
) -> list[Any]:
    model = {"image_token_id": IMAGE, "vocab_size": VOCABULARY}
    return picture_prompts(conversations, processor, num_prompts=num_prompts, **model | options)


def test_prompts_for_a_server_are_questions_from_all_over_the_dataset(
    held_out: Sequence[Conversation], processor: Any
) -> None:
    made = prompts(held_out, processor, 8)
    places = [index * len(held_out) // 8 for index in range(8)]
    asked = ask([held_out[place] for place in places], processor).questions
    firsts = [question for question in asked if len(question.sample.images) and question.answer_start]
    by_place = {question.where: question for question in reversed(firsts)}
    assert len(made) == 8
    for place, prompt in zip(places, made, strict=True):
        question = by_place[held_out[place].where]
        assert torch.equal(prompt.sample.tokens, question.sample.tokens[: question.answer_start])
        for name, tensor in question.sample.images.items():
            assert torch.equal(prompt.sample.images[name], tensor)
        # a server is given one token a picture, and puts the image features there itself
        spread_out = [token for token in prompt.tokens for _ in range(PATCHES if token == IMAGE else 1)]
        assert prompt.sample.tokens.tolist() == spread_out
        assert prompt.tokens.count(IMAGE) == len(prompt.pictures) == 1


def test_prompts_pass_over_what_cannot_be_used(processor: Any) -> None:
    alone = talk(Turn("user", "Describe it.", 1))
    long = about("word " * 300)
    made = prompts([damaged("a"), about(), long, alone], processor, 3, max_tokens=100)
    assert [len(prompt.pictures) for prompt in made] == [1, 1]
    assert prompts([], processor, 3) == []
    assert len(prompts([about()], processor, 8)) == 1
