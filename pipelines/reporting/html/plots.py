"""The plots of the HTML report, in the order in which the page shows them.

Every plot is small, since the page lays them out beside each other or, on a phone, below each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.reporting.html.model_plots import (
    errors_by_layer,
    exact_match_against_size,
    perplexity_against_size,
)
from ercsvd_deploy.pipelines.reporting.html.stage_plots import (
    quantization_losses,
    ranks_by_layer,
    search_over_layers,
    spectra,
)

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.reporting.html.drawing import Plot
    from ercsvd_deploy.pipelines.reporting.report.document import Report


def draw_plots(report: Report) -> list[Plot]:
    """Return every plot for which the report has the numbers.

    Raises:
        ImportError: matplotlib is not installed; it comes with the extra `report`.
    """
    plots = (
        perplexity_against_size(report),
        exact_match_against_size(report),
        errors_by_layer(report),
        search_over_layers(report),
        ranks_by_layer(report),
        quantization_losses(report),
        spectra(report),
    )
    return [plot for plot in plots if plot is not None]
