"""Drawing of plots: SVG in the page's colours and font, at one size, with plain axes.

matplotlib draws with placeholder colours, which CSS variables then replace: one picture serves light and
dark pages. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # matplotlib belongs to an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colour -> CSS variable of the page.
_VARIABLES = {
    "#0a0b01": "--ink",
    "#0a0b02": "--quiet",
    "#0a0b03": "--line",
    "#0a0b04": "--paper",
    "#0a0b11": "--series-1",
    "#0a0b12": "--series-2",
    "#0a0b13": "--series-3",
    "#0a0b14": "--series-4",
    "#0a0b15": "--series-5",
}
INK, QUIET, LINE, PAPER, *SERIES = _VARIABLES
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ercsvd",  # the same plot has the same bytes
    "text.parse_math": False,  # a dollar sign in a file's name is a dollar sign
    "font.family": "DejaVu Sans",  # the one that comes with matplotlib; it is wide, so what fits it fits
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": QUIET,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
_WIDTH, _HEIGHT = 4.7, 2.9  # inches; on the page about 340 to 520 pixels wide
SMALL = (2.3, 1.8)
MANY_LAYERS = 12  # beyond that, cells are too small for numbers
_LONGEST_NAME = 26


@dataclass(frozen=True)
class Plot:
    """One plot with its title and caption; several pictures are small multiples."""

    title: str
    caption: str
    pictures: tuple[str, ...]  # SVG elements


def picture(
    draw: Callable[[Axes], None],
    label: str,
    size: tuple[float, float] = (_WIDTH, _HEIGHT),
    heading: str | None = None,
) -> str:
    """Return a drawing as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if heading is not None:
            axes.set_title(heading, fontsize=9.5, loc="left")
        return _themed(figure, label)


def _themed(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element in the page's colours and font."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # matplotlib before 3.11
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    opening, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None, "matplotlib writes a viewBox"
    # Ids are unique within one file, but the page has many: only referenced ids are kept.
    referred = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in referred else "", body)
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}">{body.strip()}'


def legend(axes: Axes, columns: int) -> None:
    """Put a legend above the plot, if anything in it has a label."""
    if not axes.get_legend_handles_labels()[1]:
        return
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(columns, 2), borderaxespad=0.1)


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of the lower axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def logarithmic(axes: Axes, direction: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with few ticks and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis, scale = (axes.xaxis, axes.set_xscale) if direction == "x" else (axes.yaxis, axes.set_yscale)
    scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def finite(value: float | None) -> float | None:
    """Return a measured number; None if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None


def positive(values: Iterable[float | None]) -> list[float]:
    """Return the finite positive values: a logarithmic axis shows no others."""
    return [value for value in map(finite, values) if value is not None and value > 0]


def short(name: str) -> str:
    """Return a name, cut with an ellipsis if it is too long for a plot."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
