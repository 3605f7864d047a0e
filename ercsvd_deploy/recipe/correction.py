"""The recipe's section of a low-rank correction: what is added to the integers of a matrix. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from ercsvd_deploy.recipe.fields import Section


class Correction(Section):
    """Add a product of two small factors to the integers of a matrix: y = Q x + B (A x)."""

    rank: PositiveInt = Field(
        multiple_of=8,
        description="Rank of the factors; each costs as many weights as the matrix has rows or columns.",
    )
    bits: Literal[4, 8, 16] = Field(
        default=8, description="Bits of one stored value of the factors; 16: they stay in floating point."
    )
