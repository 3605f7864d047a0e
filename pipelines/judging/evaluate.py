"""Evaluate a model on its own: texts, questions about pictures, and lm-eval tasks where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.data.chat import check_processor
from ercsvd_deploy.data.pictures import load_processor
from ercsvd_deploy.data.rows import read_text
from ercsvd_deploy.data.texts import CalibrationError, load_tokenizer, token_windows
from ercsvd_deploy.evaluation.quality import Quality, measure_quality
from ercsvd_deploy.models.description.tasks import task_of
from ercsvd_deploy.models.description.vision import reads_images
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.inputs.pictures import ask_questions
from ercsvd_deploy.pipelines.inputs.texts import check_length
from ercsvd_deploy.pipelines.judging.differences import quality_estimates, values_of
from ercsvd_deploy.pipelines.judging.tasks import (
    EvaluationError,
    TaskResults,
    TaskSettings,
    check_tasks,
    run_tasks,
)
from ercsvd_deploy.pipelines.state.progress import ProgressReporter, silent
from ercsvd_deploy.recipe.sections import ConversationFile, ModelSource, VisualQuestions

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import QuestionSample


def evaluate_model(
    model: str,
    *,
    texts: Sequence[str] = (),
    questions: Sequence[str] = (),
    sequence_length: int | None = None,
    max_sequences: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: torch.device | None = None,
    progress: ProgressReporter = silent,
) -> dict[str, Any]:
    """Return "model", "perplexity" of each text, "exact_match" of each set, metrics of each of "tasks".

    "estimates" has all three with their 95 % intervals and counts.

    Args:
        model: Directory of an original or compressed model, or a hub id.
        texts: `FILE` or `NAME=FILE` of held-out texts.
        questions: `FILE` or `NAME=FILE` of conversations about pictures, whose answers are the reference.
        sequence_length: Tokens in each perplexity window; None for 2048, or the model's positions if fewer.
        max_sequences: Windows per text, and questions per set; None for all.
        tasks: Names of lm-eval tasks.
        limit: lm-eval documents per task.
        device: Where layers run; default the GPU if there is one.
        progress: Receives the steps of long work.

    Raises:
        EvaluationError: nothing to evaluate, lm-eval is not installed, or a task is unknown.
        CalibrationError: a text or picture cannot be read, or the model does not read pictures.
    """
    if not texts and not questions and not tasks:
        raise EvaluationError(
            "nothing to evaluate: give --text FILE, --tasks TASK or, for a model that reads pictures, "
            "--questions FILE"
        )
    device = device or default_device()
    opened = open_model(ModelSource(path=model))
    if task_of(opened.config) != "generate":
        raise EvaluationError(
            f"{model} embeds or scores texts and predicts no tokens, so it has no perplexity and no tasks: "
            "a run's gates.final_layer_error compares it with its original"
        )
    quality, notes = Quality(), list[str]()
    if texts or questions:
        windows = _read_windows(texts, opened, sequence_length, max_sequences)
        question_sets, notes = _read_questions(questions, opened, max_sequences)
        streamed = stream(opened, device)
        with progress("quality", streamed.num_layers) as on_layer:
            quality = measure_quality(streamed, windows, question_sets, on_layer)
    settings = TaskSettings(tasks, limit=limit)
    if tasks:
        check_tasks(settings)
    results = run_tasks(opened.directory, settings, device) if tasks else TaskResults()
    estimates = quality_estimates(quality, results.metrics)
    return {
        "model": model,
        "perplexity": {name: measured.value for name, measured in quality.perplexity.items()},
        "exact_match": {name: measured.value for name, measured in quality.exact_match.items()},
        "num_questions": {name: measured.num_questions for name, measured in quality.exact_match.items()},
        "notes": [*notes, *results.problems],
        "tasks": values_of(results.metrics),
        "estimates": asdict(estimates),
    }


def _read_windows(
    texts: Sequence[str], opened: OpenedModel, sequence_length: int | None, max_sequences: int | None
) -> dict[str, torch.Tensor]:
    """Return text name -> token ids [windows, tokens]."""
    if not texts:
        return {}
    tokenizer = load_tokenizer(str(opened.directory))
    text_config = opened.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or 2048
    length = sequence_length or min(2048, positions)
    check_length(length, opened.config, "--sequence-length")
    windows = {}
    for name, path in _named(texts, "--text").items():
        try:
            windows[name] = token_windows(read_text(path), tokenizer, length, text_config.vocab_size)
        except CalibrationError as error:
            raise CalibrationError(f"--text {path}: {error}") from error
    return {name: cut[:max_sequences] for name, cut in windows.items()}


def _read_questions(
    questions: Sequence[str], opened: OpenedModel, max_questions: int | None
) -> tuple[dict[str, Sequence[QuestionSample]], list[str]]:
    """Return set name -> questions about pictures, and a note for each kind of record left out."""
    if not questions:
        return {}, []
    if not reads_images(opened.config):
        raise EvaluationError(
            f"--questions: {opened.source.path} is a {opened.config.model_type} model, which is not one "
            "of the supported models that read images"
        )
    sections = {
        name: VisualQuestions(dataset=ConversationFile(conversations=path), max_questions=max_questions)
        for name, path in _named(questions, "--questions").items()
    }
    processor = load_processor(str(opened.directory))
    check_processor(processor, opened.config)
    question_sets, notes = ask_questions(sections, processor, opened.config, field="--questions")
    return {name: question_set.questions for name, question_set in question_sets.items()}, notes


def _named(arguments: Sequence[str], option: str) -> dict[str, Path]:
    """Return name -> path of arguments `FILE` or `NAME=FILE`."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name_or_file, separator, file = argument.partition("=")
        path = Path(file if separator else name_or_file)
        name = name_or_file if separator else path.stem
        if name in paths:
            raise EvaluationError(f"{option} {argument}: the name is taken; give each its own: NAME=FILE")
        paths[name] = path
    for path in paths.values():
        if not path.is_file():
            raise EvaluationError(f"{option}: {str(path)!r} is not a file")
    return paths
