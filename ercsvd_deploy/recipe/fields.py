"""Building blocks of the recipe's sections: the strict frozen model, shared field types, and refusals.

A validator's message continues "field 'a.b' ...", names the value and says what to do; `messages` adds file,
line and field in front. No torch here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]
Item = TypeVar("Item")

REFUSAL = "recipe_refusal"  # pydantic's error type of the messages written by hand
LONGEST_QUOTE = 80  # characters of a value that a message repeats


class RecipeError(ValueError):
    """A recipe cannot be used.

    Attributes:
        problems: The lines of the text: each says where, which field, what is wrong and what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PlanError(ValueError):
    """What is asked for cannot work on this model: the recipe has to be changed."""


def summarize_problems(problems: Iterable[str], most: int = 8) -> str:
    """Return problems one a line, indented; those that differ in the name of a layer's module alone once.

    Args:
        problems: One line each, such as "model.layers.3.mlp.up_proj has 5 bits".
        most: Largest number of lines; a last one counts the others.
    """
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"\S+\.\d+\.[\w.]+", "", problem), []).append(problem)
    lines = [first + (f" ({len(rest)} more are like it)" if rest else "") for first, *rest in alike.values()]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


class Section(BaseModel):
    """A mapping of the recipe: frozen, unknown keys and implicit conversions refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def quoted(value: Any) -> str:
    """Return a value as a message quotes it: on one line, shortened, spelled as in YAML."""
    constants = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return constants[value]
    text = repr(value)
    if isinstance(value, BaseModel):
        text = f"{{{', '.join(f'{name}: {quoted(entry)}' for name, entry in value)}}}"
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."


def did_you_mean(word: str, valid: Iterable[str]) -> str | None:
    """Return the valid word closest to a mistyped one, or None if none is close."""
    spellings = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(word.lower(), spellings, 1)
    return spellings[close[0]] if close else None


def refusal(text: str) -> PydanticCustomError:
    """Return the exception for a validator to raise.

    Args:
        text: Continues "field 'a.b' "; `{field}` in it stands for the field's dotted path.
    """
    return PydanticCustomError(REFUSAL, "{text}", {"text": text})


def refuse_together(problems: Iterable[tuple[Location, str]]) -> None:
    """Refuse several fields at once, each at its own location relative to the validated model.

    Raises:
        ValidationError: there is at least one problem.
    """
    details = [InitErrorDetails(type=refusal(text), loc=location, input=None) for location, text in problems]
    if details:
        raise ValidationError.from_exception_data("recipe", details)


def expects(expectation: str) -> WrapValidator:
    """Report a failed union as one expectation instead of one message for each of its members."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise refusal(f"is {quoted(value)}; it must be {expectation}") from None

    return WrapValidator(validate)


def distinguished_by(forms: Mapping[str, str], noun: str) -> tuple[Discriminator, BeforeValidator]:
    """Return the annotations that distinguish the members of a union of mappings by their required key.

    Args:
        forms: Required key -> name of the member model, which also is its tag in error locations.
        noun: Name of the mapping, for the message.
    """
    keys = ", ".join(forms)

    def tag(value: Any) -> str | None:
        if isinstance(value, BaseModel):
            return type(value).__name__
        return next((name for key, name in forms.items() if key in value), None)

    def check(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, Mapping):
            raise refusal(f"is {quoted(value)}; {noun} is a mapping with one of {keys}")
        present = [key for key in forms if key in value]
        if len(present) > 1:
            raise refusal(f"has {' and '.join(present)}; {noun} has exactly one of {keys}")
        if not present:
            close = [match for key in value if (match := did_you_mean(str(key), forms))]
            remedy = f"did you mean {close[0]!r}?" if close else "add one"
            raise refusal(f"is {quoted(value)}; {noun} has exactly one of {keys}: {remedy}")
        return value

    return Discriminator(tag), BeforeValidator(check)


def _refuse_empty(value: Any) -> Any:
    if value == "":
        raise refusal("is empty; give a path")
    return value


def _refuse_repetition(items: Sequence[Item]) -> Sequence[Item]:
    repeated = [item for position, item in enumerate(items) if item in items[:position]]
    if repeated:
        raise refusal(f"has {quoted(repeated[0])} twice; list each once")
    return items


Text = Annotated[str, StringConstraints(min_length=1)]
# YAML has no paths and no tuples: they are written as a string and a list. All else is strict: '4' is not 4.
LocalPath = Annotated[Path, BeforeValidator(_refuse_empty), Strict(False)]
ListOf = Annotated[tuple[Item, ...], Strict(False)]
ListWithoutRepetition = Annotated[
    tuple[Item, ...],
    Strict(False),
    AfterValidator(_refuse_repetition),
    Field(json_schema_extra={"uniqueItems": True}),
]

_BYTES_PER_UNIT = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TB": 10**12,
    "TiB": 2**40,
}


def parse_size(size: str) -> int:
    """Return a `Size` such as `6MB` or `3.2GiB` in bytes; KB to TB are decimal, KiB to TiB binary."""
    number = size.rstrip("KMGTiB")
    return int(float(number) * _BYTES_PER_UNIT[size[len(number) :]])


def _refuse_zero_size(value: str) -> str:
    if parse_size(value) == 0:
        raise refusal(f"is {quoted(value)}; give a size such as 5GB")
    return value


Size = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?(KB|MB|GB|KiB|MiB|GiB)$"),
    AfterValidator(_refuse_zero_size),
]
