"""Plots of whole models: quality against size, and errors layer by layer."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.html.drawing import (
    MANY_LAYERS,
    PAPER,
    SERIES,
    Plot,
    finite,
    legend,
    picture,
    short,
    whole_numbers,
)
from ercsvd_deploy.pipelines.reporting.numbers import readable_bytes

if TYPE_CHECKING:  # matplotlib belongs to an extra
    from matplotlib.axes import Axes

    from ercsvd_deploy.pipelines.judging.measurements import ModelFigures
    from ercsvd_deploy.pipelines.reporting.report.document import Reference, Report


def perplexity_against_size(report: Report) -> Plot | None:
    """Draw perplexity over bytes, before and after; None if nothing was measured."""
    models: list[ModelFigures | Reference] = [report.original, report.compressed, *report.references]
    series = {
        text: [(model.num_bytes, finite(model.perplexity.get(text))) for model in models]
        for text in report.original.perplexity
    }
    caption = "Perplexity of the next token; lower and further left is better."
    return _against_size(
        "Quality against size", caption, series, [reference.label for reference in report.references]
    )


def exact_match_against_size(report: Report) -> Plot | None:
    """Draw the share of right answers over bytes, before and after; None without questions."""
    models: list[ModelFigures | Reference] = [report.original, report.compressed, *report.references]
    series = {
        name: [(model.num_bytes, _times_100(finite(model.exact_match.get(name)))) for model in models]
        for name in report.original.exact_match
    }
    caption = "Questions about pictures answered word for word, in %; higher and further left is better."
    labels = [reference.label for reference in report.references]
    return _against_size("Answers against size", caption, series, labels, highest=100.8)  # a dot's radius


def _against_size(
    title: str,
    caption: str,
    series: dict[str, list[tuple[int, float | None]]],
    references: list[str],
    highest: float | None = None,
) -> Plot | None:
    """Draw original -> compressed for each text, and the references beside them."""
    if not any(value is not None for points in series.values() for _, value in points[1:]):
        return None
    unit, name = _unit(max(size for points in series.values() for size, _ in points))

    def draw(axes: Axes) -> None:
        for colour, (text, points) in zip(cycle(SERIES), series.items(), strict=False):
            measured = [(size / unit, value) for size, value in points[:2] if value is not None]
            axes.plot(*zip(*measured, strict=True), color=colour, linewidth=1, alpha=0.6)
            (original_size, original), (compressed_size, compressed) = points[:2]
            if original is not None:
                axes.plot([original_size / unit], [original], "o", color=colour, markerfacecolor=PAPER)
            if compressed is not None:
                axes.plot(
                    [compressed_size / unit], [compressed], "o", color=colour, label=short(text), markersize=6
                )
            for label, (size, value) in zip(references, points[2:], strict=True):
                if value is not None:
                    axes.plot([size / unit], [value], "D", color=colour, markersize=4, alpha=0.7)
                    if colour == SERIES[0]:  # one label per reference: the other series lie above or below
                        axes.annotate(
                            short(label),
                            (size / unit, value),
                            (5, 4),
                            textcoords="offset points",
                            fontsize=8,
                        )
        axes.set_xlabel(name)
        axes.set_xlim(left=0)
        axes.margins(x=0.08, y=0.15)
        axes.locator_params(axis="x", nbins=6)
        if highest is not None:
            axes.set_ylim(top=min(highest, axes.get_ylim()[1]))
        legend(axes, len(series))

    full_caption = f"{caption} Filled: this model; hollow: the original" + (
        "; diamonds: others." if references else "."
    )
    return Plot(title, full_caption, (picture(draw, title),))


def errors_by_layer(report: Report) -> Plot | None:
    """Draw how far the output of each decoder layer is from the original; None if not measured."""
    series = {text: errors for text, errors in report.change.layer_errors.items() if errors}
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for colour, (text, errors) in zip(cycle(SERIES), series.items(), strict=False):
            marker = "o" if len(errors) <= 2 * MANY_LAYERS else ""
            axes.plot(range(len(errors)), errors, marker=marker, color=colour, label=short(text))
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        whole_numbers(axes)
        legend(axes, len(series))

    title = "Error by layer"
    caption = "Relative error of each layer's output, all that happened before it included."
    return Plot(title, caption, (picture(draw, title),))


def _times_100(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _unit(largest: int) -> tuple[float, str]:
    """Return the divisor and the name of the unit in which a size reads well."""
    name = readable_bytes(largest).rpartition(" ")[2]
    return 1000.0 ** ("B", "KB", "MB", "GB", "TB").index(name), name
