"""The plot of a sweep: bytes against quality, one panel for each text, with the baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.pipelines.sweeping.results import DENSE, PointResult, SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours can be told apart by everyone; the last is for a dark page.
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_THEMES = {"light": ("#ffffff", "#222222", "#d9d9d9"), "dark": ("#0d1117", "#e6edf3", "#30363d")}
_MARKERS = "osD^vP"
_PLAIN = "plain GPTQ"


def draw_sweep(result: SweepResult, directory: Path, stem: str = "pareto") -> list[Path]:
    """Write `<stem>-light.png` and `<stem>-dark.png` and return their paths."""
    import matplotlib as mpl  # heavy, and only needed here

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for theme, (background, ink, faint) in _THEMES.items():
        style: dict[Any, Any] = {
            "figure.facecolor": background,
            "axes.facecolor": background,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": faint,
            "xtick.color": ink,
            "ytick.color": ink,
            "grid.color": faint,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        with plt.rc_context(style):
            texts = list(result.points[0].perplexity)
            figure, axes = plt.subplots(
                1, len(texts), figsize=(5.6 * len(texts), 4.8), squeeze=False, layout="constrained"
            )
            for panel, text in zip(axes[0], texts, strict=True):
                _draw_text(panel, result, text, ink)
            handles, labels = axes[0][0].get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
            )
            path = directory / f"{stem}-{theme}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            paths.append(path)
    return paths


def _draw_text(panel: Axes, result: SweepResult, text: str, ink: str) -> None:
    series: dict[tuple[str, str], list[PointResult]] = {}
    measured = [point for point in result.points if math.isfinite(point.perplexity[text])]
    for point in measured:
        if point.recipe is not None and not point.name.startswith(_PLAIN):
            series.setdefault(_series_of(point.recipe), []).append(point)
    methods = list(dict.fromkeys(method for method, _ in series))
    storages = list(dict.fromkeys(storage for _, storage in series))
    for (method, storage), points in series.items():
        colour = _SERIES[methods.index(method) % len(_SERIES)]
        number = storages.index(storage)
        panel.scatter(
            [point.num_bytes / 1e6 for point in points],
            [point.perplexity[text] for point in points],
            facecolors=colour if number == 0 else "none",
            edgecolors=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            s=34,
            label=", ".join(filter(None, (method, storage))),
        )
    front = [result.point(name) for name in result.front[text]]
    panel.plot(
        [point.num_bytes / 1e6 for point in front],
        [point.perplexity[text] for point in front],
        color=ink,
        linewidth=1,
        alpha=0.6,
        zorder=1,
        label="Pareto front",
    )
    for point in measured:
        if point.name == DENSE or point.name.startswith(_PLAIN):
            where = (point.num_bytes / 1e6, point.perplexity[text])
            panel.scatter(*where, color=ink, marker="*", s=110, zorder=3)
            panel.annotate(
                point.name,
                where,
                xytext=(5, -14),
                textcoords="offset points",
                ha="left",
                fontsize=9,
                color=ink,
            )
    panel.set_title(text.replace("_", " "), loc="left", fontsize=11)
    panel.set_xlabel("size of all tensors, MB")
    panel.set_ylabel("perplexity")
    panel.grid(alpha=0.6, linewidth=0.6)
    panel.margins(x=0.09, y=0.1)


def _series_of(recipe: dict[str, Any]) -> tuple[str, str]:
    """Return a point's label in the legend: its method and its storage."""
    stages: dict[str, dict[str, Any]] = {
        name: settings for stage in recipe["stages"] for name, settings in stage.items()
    }
    words = []
    if "factorize" in stages:
        settings = stages["factorize"]
        words.append(settings["method"])
        words += ["Fisher metric"] * (settings.get("output_metric") == "fisher")
        words += ["error control"] * (settings.get("allocation") == "error_controlled")
        words += ["pivoted"] * (settings.get("layout") == "pivoted")
    elif recipe.get("target"):
        words.append("bits by error control")
    return ", ".join(words), f"int{stages['quantize']['bits']}" if "quantize" in stages else ""


def sweep_rows(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table, the smallest model first."""
    original = result.points[0]
    texts, questions = list(original.perplexity), list(original.exact_match)
    columns = ["point", "bytes", "bits per weight", *texts, *questions, "gates", "front of"]
    rows = []
    for point in sorted(result.points, key=lambda point: point.num_bytes):
        gates = "" if not point.gates else "passed" if point.passed else "MISSED"
        fronts = ", ".join(text for text, names in result.front.items() if point.name in names)
        increases = [
            f"{value:.3f} ({100 * (value / original.perplexity[text] - 1):+.1f} %)"
            for text, value in point.perplexity.items()
        ]
        shares = [f"{100 * point.exact_match[name]:.1f} %" for name in questions]
        rows.append(
            [
                point.name,
                f"{point.num_bytes:,}",
                f"{point.bits_per_weight:.2f}",
                *increases,
                *shares,
                gates,
                fronts,
            ]
        )
    return columns, rows


def missing_texts(points: Sequence[PointResult]) -> bool:
    """Whether there is nothing to draw: no text was judged."""
    return not points[0].perplexity
