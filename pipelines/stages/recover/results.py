"""What became of the layers that were trained, as the report has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ercsvd_deploy.format.described import Count, Measured, NotReported
from ercsvd_deploy.format.schema import Storage


@dataclass(frozen=True)
class RecoveredLayer:
    """What training made of one layer."""

    layer: Annotated[Count, Field(description="Index of the decoder layer.")]
    error_before: Annotated[
        Measured,
        Field(
            description="Mean over held-out tokens of |o - t|^2 / |t|^2, o the layer's output, t the "
            "original's, with the layer as it came."
        ),
    ]
    error_after: Annotated[
        Measured,
        Field(
            description="The same after training, in the precision of the files; null if training diverged."
        ),
    ]
    is_kept: Annotated[bool, Field(description="Whether the trained layer was taken.")]
    changed_levels: Annotated[
        Count, Field(description="Integers that are rounded to another level than before.")
    ] = 0


@dataclass(frozen=True)
class RecoverOutcome:
    """What the recovery did; the trained tensors are in its layer files."""

    layers: Annotated[list[RecoveredLayer], Field(description="Every compressed layer.")]
    # The Linears whose tensors are in the files.
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Say which layers training did no good."""
        worse = [str(layer.layer) for layer in self.layers if not layer.is_kept]
        if not worse:
            return []
        named = f"layer{'s' if len(worse) > 1 else ''} {', '.join(worse)}"
        return [f"recovery did not improve {named}, left as it was; try a lower learning_rate"]
