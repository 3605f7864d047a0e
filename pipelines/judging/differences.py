"""Figures of both models with their intervals, and the paired differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.judging.measurements import Differences, QualityEstimates
from ercsvd_deploy.pipelines.judging.tasks import TaskMetrics, drop_of
from ercsvd_deploy.pipelines.judging.uncertainty import (
    mean_of,
    perplexity_increase,
    perplexity_of,
    share_drop,
    share_of,
)

if TYPE_CHECKING:
    from ercsvd_deploy.evaluation.comparison import Comparison
    from ercsvd_deploy.evaluation.quality import Quality

_QUESTIONS = "questions"


def quality_estimates(quality: Quality, tasks: TaskMetrics) -> QualityEstimates:
    """Return a model's perplexities, exact matches and task metrics, each with its 95 % interval."""
    return QualityEstimates(
        {text: perplexity_of(measured.window_losses) for text, measured in quality.perplexity.items()},
        {name: share_of(measured.is_exact, _QUESTIONS) for name, measured in quality.exact_match.items()},
        {
            task: {name: metric.estimate for name, metric in metrics.items()}
            for task, metrics in tasks.items()
        },
    )


def differences(comparison: Comparison, before: TaskMetrics, after: TaskMetrics) -> Differences:
    """Return the paired differences in quality between both models on the same items.

    Args:
        comparison: Both models' results on texts and questions.
        before: The original's tasks.
        after: The compressed model's tasks.
    """
    old, new = comparison.original, comparison.compressed
    return Differences(
        {
            text: perplexity_increase(original.window_losses, new.perplexity[text].window_losses)
            for text, original in old.perplexity.items()
        },
        {text: mean_of(values, "windows") for text, values in comparison.window_kl.items()},
        {
            name: share_drop(original.is_exact, new.exact_match[name].is_exact, _QUESTIONS)
            for name, original in old.exact_match.items()
        },
        {
            task: {name: drop_of(metrics[name], after[task][name]) for name in metrics if name in after[task]}
            for task, metrics in before.items()
            if task in after
        },
    )


def values_of(tasks: TaskMetrics) -> Mapping[str, Mapping[str, float]]:
    """Return task -> metric -> value."""
    return {task: {name: metric.value for name, metric in metrics.items()} for task, metrics in tasks.items()}
