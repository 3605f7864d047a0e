"""The plots of the HTML report: what each shows of the results.

Every plot is small, since the page lays them out beside each other or, on a phone, below each other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from statistics import fmean, median
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.html.drawing import (
    LINE,
    PAPER,
    QUIET,
    SERIES,
    SMALL,
    legend,
    logarithmic,
    picture,
    whole_numbers,
)
from ercsvd_deploy.pipelines.reporting.numbers import readable_bytes

if TYPE_CHECKING:  # matplotlib belongs to an extra
    from matplotlib.axes import Axes

    from ercsvd_deploy.pipelines.judging.measurements import ModelFigures
    from ercsvd_deploy.pipelines.reporting.document import Reference, Report
    from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear
    from ercsvd_deploy.pipelines.stages.factorize.outcome import Factorized
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedMatrix, QuantizeOutcome

_MANY_LAYERS = 12  # beyond that, cells are too small for numbers
_LONGEST_NAME = 26
_SMALLEST_SHOWN = 1e-4  # of the largest singular value: below that there is only rounding
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Plot:
    """A picture and what it says."""

    title: str
    caption: str
    pictures: tuple[str, ...]  # SVG elements; several are small multiples


def draw_plots(report: Report) -> list[Plot]:
    """Return every plot for which the report has the numbers.

    Raises:
        ImportError: matplotlib is not installed; it comes with the extra `report`.
    """
    drawn = (
        _perplexity_against_size(report),
        _exact_match_against_size(report),
        _errors_by_layer(report),
        _search(report),
        _ranks(report),
        _quantization_losses(report),
        _spectra(report),
    )
    return [plot for plot in drawn if plot is not None]


def layer_of(name: str) -> int | None:
    """Return the index of the layer a module belongs to; None outside of layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def kind_of(linear: str) -> str:
    """Return what a Linear is within its layer: the end of its name."""
    return linear.rpartition(".")[2]


def _perplexity_against_size(report: Report) -> Plot | None:
    models: list[ModelFigures | Reference] = [report.original, report.compressed, *report.references]
    series = {
        text: [(model.num_bytes, _finite(model.perplexity.get(text))) for model in models]
        for text in report.original.perplexity
    }
    caption = "Perplexity of the next token; lower and further left is better."
    return _against_size(
        "Quality against size", caption, series, [reference.label for reference in report.references]
    )


def _exact_match_against_size(report: Report) -> Plot | None:
    models: list[ModelFigures | Reference] = [report.original, report.compressed, *report.references]
    series = {
        name: [(model.num_bytes, _times_100(_finite(model.exact_match.get(name)))) for model in models]
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
            known = [(size / unit, value) for size, value in points[:2] if value is not None]
            axes.plot(*zip(*known, strict=True), color=colour, linewidth=1, alpha=0.6)
            (before, original), (after, compressed) = points[:2]
            if original is not None:
                axes.plot([before / unit], [original], "o", color=colour, markerfacecolor=PAPER)
            if compressed is not None:
                axes.plot([after / unit], [compressed], "o", color=colour, label=_short(text), markersize=6)
            for label, (size, value) in zip(references, points[2:], strict=True):
                if value is not None:
                    axes.plot([size / unit], [value], "D", color=colour, markersize=4, alpha=0.7)
                    if colour == SERIES[0]:  # the others are above and below it
                        axes.annotate(
                            _short(label),
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

    told = f"{caption} Filled: this model; hollow: the original" + (
        "; diamonds: others." if references else "."
    )
    return Plot(title, told, (picture(draw, title),))


def _errors_by_layer(report: Report) -> Plot | None:
    series = {text: errors for text, errors in report.change.layer_errors.items() if errors}
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for colour, (text, errors) in zip(cycle(SERIES), series.items(), strict=False):
            marker = "o" if len(errors) <= 2 * _MANY_LAYERS else ""
            axes.plot(range(len(errors)), errors, marker=marker, color=colour, label=_short(text))
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        whole_numbers(axes)
        legend(axes, len(series))

    title = "Error by layer"
    caption = "Relative error of each layer's output, all that happened before it included."
    return Plot(title, caption, (picture(draw, title),))


def _search(report: Report) -> Plot | None:
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None:
        return None
    chosen = factorized.num_compressed_layers
    points = [
        (point.num_compressed_layers, point.final_layer_error)
        for point in factorized.search
        if point.final_layer_error is not None
    ]
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), "o-", color=SERIES[0])
        for layers, error in points:
            if layers == chosen:
                axes.plot([layers], [error], "o", color=SERIES[1], markersize=8)
                side = "right" if layers == points[-1][0] else "center"
                axes.annotate(
                    f"chosen: {layers}", (layers, error), (0, -15), textcoords="offset points", ha=side
                )
        axes.set_xlabel("last k layers compressed")
        axes.set_ylim(bottom=0)
        whole_numbers(axes)

    title = "Search over the number of layers"
    caption = "Relative error of the last layer's output on the search sequences, all at the same budget."
    return Plot(title, caption, (picture(draw, title),))


def _ranks(report: Report) -> Plot | None:
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None:
        return None
    cells = _by_layer_and_kind(factorized.linears)
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells})
    kinds = list(dict.fromkeys(kind for _, kind in cells))

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        for (layer, kind), linear in cells.items():
            corner = (layers.index(layer) + 0.04, kinds.index(kind) + 0.06)
            share = None if linear.rank is None else linear.rank / max(1, min(linear.shape))
            if share is None:
                axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor="none", edgecolor=LINE))
            else:
                axes.add_patch(
                    Rectangle(corner, 0.92, 0.88, facecolor=SERIES[0], alpha=0.06 + 0.6 * min(1, share))
                )
            if len(layers) <= _MANY_LAYERS:
                said = "dense" if linear.rank is None else str(linear.rank)
                axes.text(corner[0] + 0.46, corner[1] + 0.44, said, ha="center", va="center", fontsize=7)
        axes.set_xlim(0, len(layers))
        axes.set_ylim(len(kinds), 0)
        step = -(-len(layers) // _MANY_LAYERS)
        axes.set_xticks([place + 0.5 for place in range(0, len(layers), step)], map(str, layers[::step]))
        axes.set_yticks([place + 0.5 for place in range(len(kinds))], map(_short, kinds))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("decoder layer")

    title = "Rank by layer"
    caption = (
        "Rank of the factors; the stronger the colour, the larger the share of full rank. Outlined: dense."
    )
    return Plot(title, caption, (picture(draw, title),))


def _quantization_losses(report: Report) -> Plot | None:
    quantized: QuantizeOutcome | None = report.stages.get("quantize")
    if quantized is None:
        return None
    layers: dict[int, list[QuantizedMatrix]] = defaultdict(list)
    for matrix in quantized.matrices:
        layer = layer_of(matrix.name)
        if layer is not None:
            layers[layer].append(matrix)
    if not layers:
        return None

    def draw(axes: Axes) -> None:
        measured: tuple[tuple[str, str, Callable[[QuantizedMatrix], float | None]], ...] = (
            ("rounding to nearest", QUIET, lambda matrix: matrix.rtn_loss),
            ("GPTQ", SERIES[0], lambda matrix: matrix.gptq_loss),
        )
        for label, colour, loss_of in measured:
            found = {layer: _positive(map(loss_of, matrices)) for layer, matrices in sorted(layers.items())}
            dots = [(layer, loss) for layer, losses in found.items() for loss in losses]
            means = [(layer, fmean(losses)) for layer, losses in found.items() if losses]
            if means:
                axes.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.35, markersize=3)
                axes.plot(*zip(*means, strict=True), color=colour, label=f"{label}, mean")
        logarithmic(axes, "y")
        axes.set_xlabel("decoder layer")
        whole_numbers(axes)
        legend(axes, 2)

    title = "Quantization loss by layer"
    caption = "Relative proxy loss of every matrix on its calibration inputs; each dot is one matrix."
    return Plot(title, caption, (picture(draw, title),))


def _spectra(report: Report) -> Plot | None:
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None:
        return None
    kinds: dict[str, list[FactorizedLinear]] = defaultdict(list)
    for linear in factorized.linears:
        if len(linear.spectrum) > 1:
            kinds[kind_of(linear.name)].append(linear)
    if not kinds:
        return None
    values = [value for linears in kinds.values() for one in linears for _, value in one.spectrum]
    lowest = max(_SMALLEST_SHOWN, 0.8 * min(_positive(values), default=0.0))
    pictures = tuple(
        _spectrum_picture(
            kind,
            tuple(tuple((at, value) for at, value in linear.spectrum) for linear in linears),
            tuple(linear.rank for linear in linears if linear.rank),
            lowest,
        )
        for kind, linears in kinds.items()
    )
    caption = (
        "Singular values relative to the largest, a line for each layer, early layers pale. What lies "
        "right of the dashed line, the median rank, was cut off."
    )
    return Plot("Spectra", caption, pictures)


@lru_cache(maxsize=64)  # a run writes its page twice: with the export, and once that is measured
def _spectrum_picture(
    kind: str, spectra: tuple[tuple[tuple[int, float], ...], ...], ranks: tuple[int, ...], lowest: float
) -> str:
    """Draw the spectra of one kind of Linear, the earliest layer first; all kinds have the same heights."""

    def draw(axes: Axes) -> None:
        for place, spectrum in enumerate(spectra):
            known = [(at, value) for at, value in spectrum if _finite(value) is not None and value > 0]
            if known:
                depth = (place + 1) / len(spectra)
                axes.plot(*zip(*known, strict=True), color=SERIES[0], alpha=0.2 + 0.8 * depth, linewidth=0.9)
        if ranks:
            axes.axvline(median(ranks), color=SERIES[1], linewidth=1, linestyle=(0, (3, 2)))
        axes.set_ylim(lowest, 1.15)
        logarithmic(axes, "x")
        logarithmic(axes, "y")
        axes.tick_params(labelsize=8)

    return picture(draw, f"Singular values of {kind}", SMALL, _short(kind))


def _by_layer_and_kind(linears: Iterable[FactorizedLinear]) -> dict[tuple[int, str], FactorizedLinear]:
    located = ((layer_of(linear.name), linear) for linear in linears)
    return {(layer, kind_of(linear.name)): linear for layer, linear in located if layer is not None}


def _finite(value: float | None) -> float | None:
    """Return a measured number; None where nothing was measured, or nothing finite."""
    return value if value is not None and math.isfinite(value) else None


def _positive(values: Iterable[float | None]) -> list[float]:
    """Return what a logarithmic axis can show."""
    return [value for value in map(_finite, values) if value is not None and value > 0]


def _times_100(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _unit(largest: int) -> tuple[float, str]:
    """Return the divisor and the name of the unit in which a size reads well."""
    name = readable_bytes(largest).rpartition(" ")[2]
    return 1000.0 ** ("B", "KB", "MB", "GB", "TB").index(name), name


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
