"""The embedded vision-language model: it sees, and it is judged as greedy decoding would judge it."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ercsvd_deploy.data.pictures import load_processor
from ercsvd_deploy.data.samples import QuestionSample, Sample
from ercsvd_deploy.evaluation.quality import measure_quality
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.pipelines.inputs.pictures import ask_questions
from ercsvd_deploy.pipelines.judging.tasks import open_for_lm_eval
from ercsvd_deploy.recipe.sections import ConversationFile, ModelSource, VisualQuestions
from tests.recipe_runs import invoke

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llava"
HELD_OUT = EXAMPLES / "pictures" / "held_out.jsonl"


def questions(number: int) -> list[QuestionSample]:
    opened = open_model(ModelSource(path=str(MODEL)))
    section = VisualQuestions(dataset=ConversationFile(conversations=HELD_OUT), max_questions=number)
    found, notes = ask_questions({"held_out": section}, load_processor(str(MODEL)), opened.config)
    assert not notes
    return list(found["held_out"].questions)


@pytest.mark.slow
def test_it_answers_nine_of_ten_questions_about_pictures_it_never_saw() -> None:
    status, output, error = invoke("eval", MODEL, "--questions", f"held_out={HELD_OUT}", "--json")
    assert status == 0, error
    assert json.loads(output)["exact_match"]["held_out"] >= 0.9


def test_no_held_out_scene_is_one_of_calibration() -> None:
    """Neither in the same drawing nor in another: a scene is held out by its contents."""
    make_pictures = runpy.run_path(str(EXAMPLES / "make_pictures.py"))
    random_scene, is_held_out = make_pictures["random_scene"], make_pictures["is_held_out"]
    rng = random.Random(0)
    scenes = [random_scene(rng, held_out=flag) for flag in (True, False) for _ in range(500)]
    assert not set(scenes[:500]) & set(scenes[500:])
    assert all(is_held_out(scene) for scene in scenes[:500])
    # However the objects of a scene are listed, it is the same scene.
    assert all(is_held_out(scene[::-1]) for scene in scenes[:500])


@pytest.mark.slow
def test_exact_match_is_that_of_greedy_decoding() -> None:
    """Of the streamed judgement each single verdict must be that of generating the answer and comparing."""
    asked = questions(40)
    # A wrong reference for every fifth question, so that there are wrong answers, too.
    asked = [
        QuestionSample(
            Sample(torch.cat([tokens[:start], torch.tensor([77, 1])]), question.sample.images),
            start,
            question.question,
            "wrong",
            question.where,
        )
        if index % 5 == 0
        else question
        for index, question in enumerate(asked)
        for tokens, start in [(question.sample.tokens, question.answer_start)]
    ]
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    streamed = stream(open_model(ModelSource(path=str(MODEL))), torch.device("cpu"))
    verdicts = measure_quality(streamed, {}, {str(i): [one] for i, one in enumerate(asked)}).exact_match
    for index, question in enumerate(asked):
        prompt = question.sample.tokens[: question.answer_start]
        reference = question.sample.tokens[question.answer_start :]
        with torch.no_grad():
            said = model.generate(
                input_ids=prompt[None],
                **question.sample.images,
                max_new_tokens=len(reference),
                do_sample=False,
            )[0, len(prompt) :]
        assert verdicts[str(index)].value == float(said.tolist() == reference.tolist()), question.where
    values = [verdict.value for verdict in verdicts.values()]
    assert 0 < sum(values) < len(values)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to evaluate: give --text FILE, --tasks TASK or"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--questions", "a=x.jsonl", "--questions", "a=y.jsonl"], "the name is taken"),
    ],
)
def test_eval_says_what_is_wrong(arguments: list[str], expected: str) -> None:
    status, _, error = invoke("eval", MODEL, *arguments)
    assert status == 1
    assert expected in error


def test_a_text_model_is_not_asked_about_pictures() -> None:
    status, _, error = invoke("eval", EXAMPLES / "tiny-llama", "--questions", HELD_OUT)
    assert status == 1
    assert "is a llama model, which is not one of the supported models that read images" in error


def test_lm_eval_shows_it_pictures() -> None:
    from lm_eval.api.instance import Instance

    record = json.loads(HELD_OUT.read_text().splitlines()[0])
    model = open_for_lm_eval(MODEL, torch.device("cpu"), batch_size=1)
    prompt = model.apply_chat_template([{"role": "user", "content": record["conversations"][0]["value"]}])
    arguments = (
        prompt,
        {"until": ["</s>"], "max_gen_toks": 4},
        {"visual": [Image.open(HELD_OUT.parent / record["image"])]},
    )
    (answer,) = model.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    assert answer.strip() == record["conversations"][1]["value"]
