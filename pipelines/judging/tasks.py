"""lm-eval's tasks: the only module that calls lm-eval and reads its results.

lm-eval names a metric `acc,none`: the metric and the filter applied to the answers. Here the filter `none` is
left out; others stay (`exact_match,strict-match`), in lm-eval's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.description.vision import reads_images
from ercsvd_deploy.pipelines.judging.uncertainty import Estimate, mean_of, share_drop, with_standard_error

_PLAIN_FILTER = "none"
_STANDARD_ERROR = "_stderr"
_UNIT = "documents"
# The metrics that `task_drop` judges by default: the first of these that a task has.
JUDGED_METRICS = ("acc_norm", "acc", "exact_match")


class EvaluationError(ValueError):
    """An evaluation cannot be carried out as asked."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run, the same for both models.

    Attributes:
        tasks: Names of tasks, groups or tags.
        num_fewshot: Examples in the prompt; None: the task's own.
        limit: Documents of each task; None: all.
        batch_size: Requests in a batch.
        apply_chat_template: Whether prompts are put into the tokenizer's chat template.
        fewshot_as_multiturn: Whether examples are turns of the conversation.
        include_path: Directory with tasks of the user's own.
        trust_remote_code: Whether the model's own code is run.
    """

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    include_path: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TaskMetric:
    """One metric of one task.

    Attributes:
        value: The value that lm-eval aggregates over documents.
        standard_error: lm-eval's standard error; None if it gives none.
        num_documents: Number of documents measured.
        is_higher_better: Whether a higher value is better; None where lm-eval does not say.
        by_document: Document index -> its value; empty if the metric is not a mean over documents.
    """

    value: float
    standard_error: float | None
    num_documents: int
    is_higher_better: bool | None = True
    by_document: Mapping[int, float] = field(default_factory=dict)

    @property
    def estimate(self) -> Estimate:
        """The value with the interval of lm-eval's standard error."""
        return with_standard_error(self.value, self.standard_error, self.num_documents, _UNIT)


TaskMetrics = Mapping[str, Mapping[str, TaskMetric]]  # task -> metric name -> metric


@dataclass
class TaskResults:
    """One model's metrics on tasks; a failed task has a line in `problems` and no metrics."""

    metrics: dict[str, dict[str, TaskMetric]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_tasks(settings: TaskSettings) -> None:
    """Load every task with its documents, downloading them if needed, before hours of other work.

    Raises:
        EvaluationError: lm-eval is not installed, or tasks are unknown or cannot be loaded; all are named.
    """
    manager = _task_manager(settings.include_path)
    unknown = sorted(set(settings.tasks) - set(manager.all_tasks))
    if unknown:
        raise EvaluationError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    problems = []
    for task in settings.tasks:
        try:
            loaded = manager.load([task])["tasks"]
            for loaded_task in loaded.values():
                next(iter(loaded_task.eval_docs))
        except Exception as error:  # noqa: BLE001 - tasks are foreign code, and one of many fails alone
            problems.append(f"{task}: {_one_line(error)}")
    if problems:
        raise EvaluationError(
            f"lm-eval cannot load {'; '.join(problems)}. Remove the task, or make its data available here"
        )


def run_tasks(directory: Path, settings: TaskSettings, device: torch.device) -> TaskResults:
    """Return lm-eval's metrics of a model loaded with transformers; a failed task does not stop the others.

    Raises:
        EvaluationError: lm-eval is not installed.
        OSError, RuntimeError, ValueError: the model cannot be loaded.
    """
    model = open_for_lm_eval(
        directory, device, settings.batch_size, trust_remote_code=settings.trust_remote_code
    )
    return run_tasks_on(model, settings)


def run_tasks_on(model: Any, settings: TaskSettings) -> TaskResults:
    """Return lm-eval's metrics of a model in one of its wrappers; a failed task does not stop the others.

    Raises:
        EvaluationError: lm-eval is not installed.
    """
    manager = _task_manager(settings.include_path)
    results = TaskResults()
    for task in settings.tasks:
        try:
            answer = _evaluate(model, task, settings, manager)
        except Exception as error:  # noqa: BLE001 - tasks are foreign code, and one of many fails alone
            results.problems.append(f"lm-eval's task {task} was not measured: {_one_line(error)}")
            continue
        results.metrics |= read_results(answer)
    return results


def _evaluate(model: Any, task: str, settings: TaskSettings, manager: Any) -> dict[str, Any]:
    import lm_eval

    answer: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        log_samples=True,  # per document, so that both models' answers can be paired
    )
    return answer


def read_results(answer: Mapping[str, Any]) -> dict[str, dict[str, TaskMetric]]:
    """Return task -> metric name -> metric, from the result of `lm_eval.simple_evaluate`."""
    metrics_by_task: dict[str, dict[str, TaskMetric]] = {}
    for task, values in {**answer["results"], **answer.get("groups", {})}.items():
        count = _num_documents(answer, task)
        better = answer.get("higher_is_better", {}).get(task, {})
        metrics = {}
        for key, value in values.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith(_STANDARD_ERROR) or not isinstance(value, int | float):
                continue
            by_document = _by_document(answer.get("samples", {}).get(task, ()), name, filtered)
            error = values.get(f"{name}{_STANDARD_ERROR},{filtered}")
            mean = sum(by_document.values()) / len(by_document) if by_document else None
            metrics[name if filtered == _PLAIN_FILTER else f"{name},{filtered}"] = TaskMetric(
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                num_documents=count or len(by_document),
                is_higher_better=better.get(name),
                by_document=by_document if mean is not None and abs(mean - value) < 1e-6 else {},
            )
        metrics_by_task[task] = metrics
    return metrics_by_task


def _num_documents(answer: Mapping[str, Any], task: str) -> int:
    """Return the number of documents of a task, or of all tasks of a group."""
    counts = answer.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_num_documents(answer, part) for part in answer.get("group_subtasks", {}).get(task, ()))


def _by_document(samples: Sequence[Mapping[str, Any]], name: str, filtered: str) -> dict[int, float]:
    """Return document -> value of a metric; empty if any document has no number."""
    values = {
        sample["doc_id"]: sample.get(name)
        for sample in samples
        if sample.get("filter", _PLAIN_FILTER) == filtered
    }
    numbers = {document: value for document, value in values.items() if isinstance(value, int | float)}
    return (
        {document: float(value) for document, value in numbers.items()} if len(numbers) == len(values) else {}
    )


def find_metric(metrics: Mapping[str, object], name: str = "") -> str | None:
    """Return the full name of a task's metric; None if the task does not have it.

    Args:
        metrics: The task's metrics by full name.
        name: Metric name with or without a filter; without one, lm-eval's first filter counts. Empty: the
            first of `JUDGED_METRICS` that the task has.
    """
    for candidate in [name] if name else JUDGED_METRICS:
        if candidate in metrics:
            return candidate
        filtered = next((full for full in metrics if full.partition(",")[0] == candidate), None)
        if filtered is not None:
            return filtered
    return None


def drop_of(before: TaskMetric, after: TaskMetric) -> Estimate:
    """Return by how much a metric got worse, positive for a loss.

    If both models have a value for every document, the difference is paired: McNemar's interval for values
    that are 0 or 1, a t interval for others. Otherwise it comes from both standard errors.
    """
    sign = -1.0 if before.is_higher_better is False else 1.0
    documents = sorted(before.by_document.keys() & after.by_document.keys())
    if documents and len(documents) == len(before.by_document) == len(after.by_document):
        old = [before.by_document[document] for document in documents]
        new = [after.by_document[document] for document in documents]
        if {*old, *new} <= {0.0, 1.0}:
            pairs = ([bool(value) for value in old], [bool(value) for value in new])
            return share_drop(*(pairs if sign > 0 else pairs[::-1]), _UNIT)
        return mean_of([sign * (a - b) for a, b in zip(old, new, strict=True)], _UNIT)
    errors = (before.standard_error, after.standard_error)
    together = None if None in errors else sum(error**2 for error in errors if error is not None) ** 0.5
    return with_standard_error(
        sign * (before.value - after.value), together, min(before.num_documents, after.num_documents), _UNIT
    )


def open_for_lm_eval(
    directory: Path, device: torch.device, batch_size: int = 8, *, trust_remote_code: bool = False
) -> Any:
    """Return lm-eval's wrapper of a model, compressed or not: the multimodal one if it reads images."""
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints

    config = load_config(str(directory), trust_remote_code=trust_remote_code)
    model_class = HFMultimodalLM if reads_images(config) else HFLM
    return model_class(
        pretrained=str(directory),
        device=str(device),
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        attn_implementation=attention_implementation(config),
    )


def _task_manager(include_path: Path | None) -> Any:
    """Return lm-eval's tasks with those of a folder, read again if a file there has changed.

    Raises:
        EvaluationError: lm-eval is not installed.
    """
    files = [] if include_path is None else [path for path in include_path.rglob("*") if path.is_file()]
    return _read_tasks(include_path, frozenset((path, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=2)
def _read_tasks(include_path: Path | None, _versions: frozenset[tuple[Path, int]]) -> Any:
    """Read all task files, which takes lm-eval five seconds; a run asks before and after its work."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError(
            "lm-eval tasks need the eval extra: pip install 'ercsvd-deploy[eval]'"
        ) from None
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
