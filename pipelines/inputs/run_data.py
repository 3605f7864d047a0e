"""Everything a recipe reads besides the model: calibration samples, held-out texts and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.data.chat import check_processor
from ercsvd_deploy.data.pictures import PicturePrompt, load_processor
from ercsvd_deploy.data.samples import QuestionSample, Sample, text_samples
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.models.description.vision import reads_images
from ercsvd_deploy.pipelines.inputs.parity_prompts import NUM_PICTURE_PROMPTS, longest_prompt
from ercsvd_deploy.pipelines.inputs.pictures import (
    ask_questions,
    draw_pictures,
    draw_prompts,
    parity_datasets,
)
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows, evaluation_windows

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.inputs.model import OpenedModel
    from ercsvd_deploy.recipe.sections import Recipe


@dataclass(frozen=True)
class RunData:
    """The data of a run, read once before any weight.

    Attributes:
        samples: Calibration samples in a seeded order, text and pictures mixed; None without calibration.
        texts: Held-out text -> token ids [windows, tokens].
        questions: Name -> questions about held-out pictures.
        picture_prompts: Prompts about pictures for serving parity; empty without that gate.
        warnings: Notes on data that was left out.
    """

    samples: Sequence[Sample] | None
    texts: Mapping[str, torch.Tensor]
    questions: Mapping[str, Sequence[QuestionSample]]
    picture_prompts: Sequence[PicturePrompt]
    warnings: tuple[str, ...]


def load_run_data(recipe: Recipe, opened: OpenedModel) -> RunData:
    """Read all data of a recipe.

    Raises:
        CalibrationError: something cannot be read, is too short, or does not belong to the model.
    """
    directory, trusted = str(opened.directory), recipe.model.trust_remote_code
    vocab_size = opened.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(directory, trust_remote_code=trusted)
    processor = None
    measures_parity = recipe.gates is not None and recipe.gates.serving_parity is not None
    picture_datasets = parity_datasets(recipe) if measures_parity else []
    if recipe.picture_share or recipe.evaluation.visual_questions or picture_datasets:
        assert reads_images(opened.config), "refused when the recipe was checked against the config"
        processor = load_processor(directory, trust_remote_code=trusted)
        check_processor(processor, opened.config)
    texts, text_notes = evaluation_windows(recipe, tokenizer, vocab_size)
    question_sets, notes = ask_questions(recipe.evaluation.visual_questions, processor, opened.config)
    notes += text_notes
    prompts: list[PicturePrompt] = []
    if picture_datasets:
        prompts = draw_prompts(
            picture_datasets,
            processor,
            opened.config,
            num_prompts=NUM_PICTURE_PROMPTS,
            max_tokens=longest_prompt(opened.config),
        )
    if measures_parity and reads_images(opened.config) and not prompts:
        notes.append(
            "gates.serving_parity is measured on texts alone, without pictures: there is no question about "
            "one in evaluation.visual_questions or vision.calibration"
        )
    samples: list[Sample] | None = None
    if recipe.calibration is not None:
        samples = []
        num_pictures = round(recipe.picture_share * recipe.calibration.num_samples)
        num_texts = recipe.calibration.num_samples - num_pictures
        if num_texts:
            windows, window_notes = calibration_windows(recipe.calibration, tokenizer, vocab_size, num_texts)
            notes += window_notes
            samples += text_samples(windows)
        if num_pictures and recipe.vision is not None:
            picture_samples, left_out = draw_pictures(
                recipe.vision, recipe.calibration, num_pictures, processor, opened.config
            )
            samples = _mixed([*samples, *picture_samples.samples], recipe.calibration.seed)
            notes += left_out
    questions = {name: question_set.questions for name, question_set in question_sets.items()}
    return RunData(samples, texts, questions, tuple(prompts), tuple(notes))


def _mixed(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return the samples in a seeded order: the first ones, which a search uses, are then of every kind."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[index] for index in order.tolist()]
