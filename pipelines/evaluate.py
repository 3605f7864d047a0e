"""Evaluate a model on its own: perplexity on texts, and lm-eval tasks where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.calibration import CalibrationError, load_tokenizer, read_text, token_windows
from ercsvd_deploy.evaluation import perplexities
from ercsvd_deploy.pipelines.model_source import default_device, open_model, stream
from ercsvd_deploy.pipelines.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.texts import check_length
from ercsvd_deploy.recipe_schema import ModelSource


class EvaluationError(ValueError):
    """An evaluation cannot be carried out as asked."""


def evaluate_model(
    model: str,
    *,
    texts: Sequence[str],
    sequence_length: int | None = None,
    max_sequences: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: torch.device | None = None,
    progress: ProgressReporter = silent,
) -> dict[str, Any]:
    """Return {"model", "perplexity": {text: value}, "tasks": {task: {metric: value}}}.

    Args:
        model: Directory of an original or compressed model, or a hub id.
        texts: `FILE` or `NAME=FILE` of held-out texts.
        sequence_length: Tokens in each perplexity window; None for 2048, or the model's positions if fewer.
        max_sequences: Windows per text; None for all.
        tasks: Names of lm-eval tasks.
        limit: lm-eval documents per task.
        device: Where layers run; default the GPU if there is one.
        progress: Told about long work.

    Raises:
        EvaluationError: nothing to evaluate, lm-eval is not installed, or a task is unknown.
    """
    if not texts and not tasks:
        raise EvaluationError("nothing to evaluate: give --text FILE or --tasks TASK")
    device = device or default_device()
    opened = open_model(ModelSource(path=model))
    perplexity: dict[str, float] = {}
    if texts:
        tokenizer = load_tokenizer(str(opened.directory))
        vocab_size = opened.config.get_text_config().vocab_size
        positions = getattr(opened.config.get_text_config(), "max_position_embeddings", None) or 2048
        length = sequence_length or min(2048, positions)
        check_length(length, opened.config, "--sequence-length")
        windows: dict[str, torch.Tensor] = {}
        for text in texts:
            name, separator, file = text.partition("=")
            path = Path(file if separator else text)
            try:
                cut = token_windows(read_text(path), tokenizer, length, vocab_size)
            except CalibrationError as error:
                raise CalibrationError(f"--text {text}: {error}") from error
            if (name if separator else path.stem) in windows:
                raise EvaluationError(f"--text {text}: the name is taken; give each text its own: NAME=FILE")
            windows[name if separator else path.stem] = cut[:max_sequences]
        streamed = stream(opened, device)
        with progress("perplexity", streamed.num_layers) as on_layer:
            measured = perplexities(streamed, windows, on_layer)
        perplexity = {name: value.value for name, value in measured.items()}
    found = run_lm_eval(opened.directory, tasks, limit=limit, device=device) if tasks else {}
    return {"model": model, "perplexity": perplexity, "tasks": found}


def check_tasks(tasks: Sequence[str]) -> Any:
    """Return lm-eval's task manager, after checking that it knows all tasks.

    Raises:
        EvaluationError: lm-eval is not installed or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError(
            "lm-eval tasks need the eval extra: pip install 'ercsvd-deploy[eval]'"
        ) from None
    manager = TaskManager()
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise EvaluationError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return manager


def run_lm_eval(
    directory: Path,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, measured by lm-eval on the model loaded with transformers.

    Raises:
        EvaluationError: lm-eval is not installed or knows no such task.
    """
    manager = check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints

    model = HFLM(pretrained=str(directory), device=str(device), batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager
    )["results"]
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in metrics.items()
            if isinstance(value, float)
            and not metric.startswith(("alias", "sample"))
            and "stderr" not in metric
        }
        for task, metrics in results.items()
    }
