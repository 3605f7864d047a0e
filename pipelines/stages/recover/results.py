"""The results of recovery, as the report has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count, Measured, NotReported
from ercsvd_deploy.format.schema import Storage


@dataclass(frozen=True)
class RecoveredLayer:
    """Result of training one layer."""

    layer: Annotated[Count, Field(description="Index of the decoder layer.")]
    error_before: Annotated[
        Measured,
        Field(
            description="Mean over held-out tokens of |o - t|^2 / |t|^2, o the layer's output, t the "
            "original's, before training."
        ),
    ]
    error_after: Annotated[
        Measured,
        Field(description="The error after training, in the files' dtype; null if training diverged."),
    ]
    is_kept: Annotated[bool, Field(description="Whether the trained parameters are used.")]
    changed_levels: Annotated[Count, Field(description="Number of integers whose level changed.")] = 0


@dataclass(frozen=True)
class EndToEnd:
    """Result of training all layers together."""

    steps: Annotated[Count, Field(description="Steps of the optimizers.")]
    divergence_before: Annotated[
        Measured,
        Field(
            description="Mean over held-out tokens of KL(original || compressed) of next-token predictions, "
            "in nats, after the training of single layers."
        ),
    ]
    divergence_after: Annotated[
        Measured,
        Field(description="The divergence at the end, in the files' dtype; null if training diverged."),
    ]
    is_kept: Annotated[bool, Field(description="Whether the trained parameters are used.")]


@dataclass(frozen=True)
class RecoverOutcome:
    """Result of the recovery; the trained tensors are in its files."""

    layers: Annotated[list[RecoveredLayer], Field(description="Every compressed layer.")]
    # Name -> storage of the Linears whose tensors are in the files.
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)
    end_to_end: Annotated[
        EndToEnd | None, Field(description="The training of all layers together; null without it.")
    ] = None

    def warnings(self) -> list[str]:
        """Return warnings about what training did not improve: layers by number, or all together."""
        warnings = []
        if not self.layers:
            warnings.append(
                "recovery had nothing to train: it trains compressed Linears of the decoder, but for routed "
                "experts, and there are none; remove the stage"
            )
        if not_improved := [str(layer.layer) for layer in self.layers if not layer.is_kept]:
            named = f"layer{'s' if len(not_improved) > 1 else ''} {', '.join(not_improved)}"
            warnings.append(
                f"recovery did not improve {named}, left as it was; try more calibration or a lower "
                "learning_rate"
            )
        if self.end_to_end is not None and not self.end_to_end.is_kept:
            warnings.append(
                "end-to-end recovery did not improve the predictions, and its result is not used; try a "
                "lower learning_rate or more calibration"
            )
        return warnings
