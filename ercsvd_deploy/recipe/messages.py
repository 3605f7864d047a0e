"""Turn pydantic's errors into lines that a user can act on: place, field, value and remedy.

Pydantic locates an error by a path that also names the union members that it tried. `_resolve` walks the
models along that path to remove these names; `fields_at` gives the fields that are valid there. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ercsvd_deploy.recipe.fields import REFUSAL, Location, RecipeError, Section, did_you_mean, quoted
from ercsvd_deploy.recipe.sections import Recipe

# pydantic's error type -> the expected value; braces hold the error's context.
EXPECTATIONS = {
    "bool_type": "true or false",
    "dict_type": "a mapping (name: value)",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number (without quotes)",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 18 digits",
    "int_type": "a whole number (without quotes)",
    "invalid_key": "called by text (put the key in quotes)",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a mapping (key: value)",
    "multiple_of": "a multiple of {multiple_of}",
    "path_type": "a path",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text that is not empty",
    "string_type": "text (if it is meant as text, put it in quotes)",
    "string_unicode": "text without half a surrogate pair",
    "too_long": "a list with at most {max_length} entries",
    "too_short": "a list with at least {min_length} entry",
    "tuple_type": "a list",
}


def explain(
    error: ValidationError, origin_of: Callable[[Location], str], whole: type[Section] = Recipe
) -> RecipeError:
    """Return the error that reports all of pydantic's errors, one a line.

    Args:
        error: pydantic's error from validating a `whole`.
        origin_of: Field location -> `file:line:column` or the override it comes from.
        whole: The model of the whole file.
    """
    lines = []
    for detail in error.errors(include_url=False):
        if _is_echo(detail):
            continue
        location, _ = _resolve(detail["loc"], whole)
        field = (
            quoted(".".join(str(part) for part in location)) if location else f"'{whole.__name__.lower()}'"
        )
        lines.append(f"{origin_of(location)}: field {field} {_describe(detail, field, whole)}")
    return RecipeError(lines)


def fields_at(location: Iterable[str | int], whole: type[Section] = Recipe) -> dict[str, FieldInfo]:
    """Return the fields that a mapping at this location may have; empty if it is not a section."""
    _, annotations = _resolve(location, whole)
    sections = [annotation for annotation in annotations if _is_section(annotation)]
    return {name: field for section in sections for name, field in section.model_fields.items()}


def _is_echo(detail: ErrorDetails) -> bool:
    """Whether an error calls a list too short only because its entries were refused."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _describe(detail: ErrorDetails, field: str, whole: type[Section]) -> str:
    """Return the problem with a field's value, and the remedy."""
    kind, value = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    parent, name = detail["loc"][:-1], str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == REFUSAL:
        return str(context["text"]).replace("{field}", field.strip("'"))
    if kind == "extra_forbidden":
        valid = fields_at(parent, whole)
        close = did_you_mean(name, valid)
        remedy = f"did you mean {close!r}?" if close else f"known here: {', '.join(valid)}"
        return f"is unknown (value {quoted(value)}); {remedy}"
    if kind == "missing":
        description = fields_at(parent, whole)[name].description
        return f"is missing; add it: {description}"
    expectation = EXPECTATIONS.get(kind)
    if expectation is None:
        return f"is {quoted(value)}: {detail['msg']}"
    text = f"is {quoted(value)}; it must be {expectation.format_map(context)}"
    if kind == "literal_error" and isinstance(value, str):
        close = did_you_mean(
            value, [word.strip("' ") for word in context["expected"].replace(" or ", ",").split(",")]
        )
        text += f"; did you mean {close!r}?" if close else ""
    return text


def _resolve(location: Iterable[str | int], whole: type[Section]) -> tuple[Location, list[Any]]:
    """Return the location as the user wrote it, and the types that are valid there.

    Pydantic adds the tag of the union member it chose, which is a model's name here, and `[key]`
    after a refused key.
    """
    user_location: list[str | int] = []
    candidates: list[Any] = [whole]
    for part in location:
        members = [annotation for annotation in candidates if _is_section(annotation)]
        tagged = [member for member in members if member.__name__ == part]
        if tagged and len(members) > 1:
            candidates = tagged
        elif part != "[key]":
            user_location.append(part)
            candidates = [inner for candidate in candidates for inner in _entries(candidate, part)]
    return tuple(user_location), candidates


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _entries(annotation: Any, part: str | int) -> Iterator[Any]:
    """Yield the types that are valid under the key or index `part` of a value of this type."""
    if _is_section(annotation):
        if part in annotation.model_fields:
            yield from _members(annotation.model_fields[part].annotation)
    elif get_origin(annotation) is tuple:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) is Mapping:
        yield from _members(get_args(annotation)[1])


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the plain types of a union, without their annotations."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in {Union, UnionType}:
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation
