"""Plots of the stages' results: ranks and their search, spectra, and losses of quantization."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from statistics import fmean, median
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.html.drawing import (
    LINE,
    MANY_LAYERS,
    QUIET,
    SERIES,
    SMALL,
    Plot,
    finite,
    legend,
    logarithmic,
    picture,
    positive,
    short,
    whole_numbers,
)

if TYPE_CHECKING:  # matplotlib belongs to an extra
    from matplotlib.axes import Axes

    from ercsvd_deploy.pipelines.reporting.report.document import Report
    from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear
    from ercsvd_deploy.pipelines.stages.factorize.outcome import Factorized
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedMatrix, QuantizeOutcome

_SMALLEST_SHOWN = 1e-4  # of the largest singular value: smaller ones are rounding errors
_LAYER = re.compile(r"\.(\d+)\.")


def search_over_layers(report: Report) -> Plot | None:
    """Draw the error of every number of compressed layers that a search tried; None without a search."""
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None:
        return None
    chosen_layers = factorized.num_compressed_layers
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
            if layers == chosen_layers:
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


def ranks_by_layer(report: Report) -> Plot | None:
    """Draw the rank of every factorized Linear; None without factors."""
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
            if len(layers) <= MANY_LAYERS:
                label = "dense" if linear.rank is None else str(linear.rank)
                axes.text(corner[0] + 0.46, corner[1] + 0.44, label, ha="center", va="center", fontsize=7)
        axes.set_xlim(0, len(layers))
        axes.set_ylim(len(kinds), 0)
        step = -(-len(layers) // MANY_LAYERS)
        axes.set_xticks([place + 0.5 for place in range(0, len(layers), step)], map(str, layers[::step]))
        axes.set_yticks([place + 0.5 for place in range(len(kinds))], map(short, kinds))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("decoder layer")

    title = "Rank by layer"
    caption = (
        "Rank of the factors; the stronger the colour, the larger the share of full rank. Outlined: dense."
    )
    return Plot(title, caption, (picture(draw, title),))


def quantization_losses(report: Report) -> Plot | None:
    """Draw the loss of every quantized matrix, by rounding and by GPTQ; None without any."""
    quantized: QuantizeOutcome | None = report.stages.get("quantize")
    if quantized is None:
        return None
    layers: dict[int, list[QuantizedMatrix]] = defaultdict(list)
    for matrix in quantized.matrices:
        layer = layer_of(matrix.name)
        if layer is not None and matrix.routed_tokens is None:  # experts are left out: there are thousands
            layers[layer].append(matrix)
    if not layers:
        return None

    def draw(axes: Axes) -> None:
        measured: tuple[tuple[str, str, Callable[[QuantizedMatrix], float | None]], ...] = (
            ("rounding to nearest", QUIET, lambda matrix: matrix.rtn_loss),
            ("GPTQ", SERIES[0], lambda matrix: matrix.gptq_loss),
        )
        for label, colour, loss_of in measured:
            losses_by_layer = {
                layer: positive(map(loss_of, matrices)) for layer, matrices in sorted(layers.items())
            }
            dots = [(layer, loss) for layer, losses in losses_by_layer.items() for loss in losses]
            means = [(layer, fmean(losses)) for layer, losses in losses_by_layer.items() if losses]
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


def spectra(report: Report) -> Plot | None:
    """Draw the singular values of every kind of Linear; None without factors."""
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None:
        return None
    kinds: dict[str, list[FactorizedLinear]] = defaultdict(list)
    for linear in factorized.linears:
        if len(linear.spectrum) > 1:
            kinds[kind_of(linear.name)].append(linear)
    if not kinds:
        return None
    values = [value for linears in kinds.values() for linear in linears for _, value in linear.spectrum]
    lowest = max(_SMALLEST_SHOWN, 0.8 * min(positive(values), default=0.0))
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


@lru_cache(maxsize=64)  # a run writes its page twice: with the export, and after measuring it
def _spectrum_picture(
    kind: str, spectra: tuple[tuple[tuple[int, float], ...], ...], ranks: tuple[int, ...], lowest: float
) -> str:
    """Draw the spectra of one kind of Linear, the earliest layer first; all kinds have the same heights."""

    def draw(axes: Axes) -> None:
        for place, spectrum in enumerate(spectra):
            visible = [(at, value) for at, value in spectrum if finite(value) is not None and value > 0]
            if visible:
                depth = (place + 1) / len(spectra)
                axes.plot(
                    *zip(*visible, strict=True), color=SERIES[0], alpha=0.2 + 0.8 * depth, linewidth=0.9
                )
        if ranks:
            axes.axvline(median(ranks), color=SERIES[1], linewidth=1, linestyle=(0, (3, 2)))
        axes.set_ylim(lowest, 1.15)
        logarithmic(axes, "x")
        logarithmic(axes, "y")
        axes.tick_params(labelsize=8)

    return picture(draw, f"Singular values of {kind}", SMALL, short(kind))


def _by_layer_and_kind(linears: Iterable[FactorizedLinear]) -> dict[tuple[int, str], FactorizedLinear]:
    located = ((layer_of(linear.name), linear) for linear in linears)
    return {(layer, kind_of(linear.name)): linear for layer, linear in located if layer is not None}


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that a module belongs to; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def kind_of(linear: str) -> str:
    """Return a Linear's kind, the last part of its name."""
    return linear.rpartition(".")[2]
