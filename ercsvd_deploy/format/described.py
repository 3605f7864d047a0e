"""Types for the fields of results, so that one dataclass serves as result, as JSON schema and as reader."""

from __future__ import annotations

import math
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

Value = TypeVar("Value")


def _read_measured(value: object) -> object:
    return math.nan if value is None else value


Measured = Annotated[
    float,
    BeforeValidator(_read_measured),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
"""A measured number; a value that is not finite is null in JSON."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Shape = tuple[Count, Count]
"""Outputs and inputs of a matrix."""

NotReported = Annotated[Value, SkipJsonSchema(), Field(exclude=True)]
"""A field that only the program uses: neither in the JSON nor in its schema. It needs a default."""
