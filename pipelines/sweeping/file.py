"""The file that `ercsvd sweep` reads: a recipe, a grid over its fields, and the criterion for the best point.

    recipe: recipes/demo.yaml
    set: {calibration.num_samples: 64}
    grid:
      factorize.method: [svd_llm, erc_svd]
      factorize.compression_ratio: [0.2, 0.4]
    also:
      - {name: not quantized, set: {quantize: null}}
    output: out/sweep
    pick: {smallest: true}

Every combination of the grid is one point, and every entry of `also` one more; `set` holds for all. A field
is written as for `--set`; null removes it, so that `quantize: null` is the recipe without its quantize stage.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ercsvd_deploy.recipe.fields import ListOf, LocalPath, Section, Size, Text, refusal
from ercsvd_deploy.recipe.load import RecipeError, canonical, load_recipe
from ercsvd_deploy.recipe.messages import explain
from ercsvd_deploy.recipe.sections import Recipe
from ercsvd_deploy.recipe.yaml_source import read_yaml_file

RESULTS_FILE = "sweep.json"  # in a sweep's output
WORK = "sweep"  # a sweep's work directory lies beside this name in its output
_MOST_POINTS = 1000
_OWN_KEYS = frozenset({"recipe", "grid", "also"})  # no recipe has them
_KEYS_OF_RECIPES = frozenset({"model", "stages"})


class Pick(Section):
    """Which point is the best one; exactly one of the keys."""

    smallest: bool | None = Field(default=None, description="The smallest that passes the recipe's gates.")
    best_under: Size | None = Field(
        default=None,
        description="The one that loses least on its worst text, among those of at most this size.",
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Pick:
        if (self.smallest is True) == (self.best_under is not None):
            raise refusal("has to have exactly one of smallest: true and best_under: SIZE")
        return self


class NamedPoint(Section):
    """A single point."""

    name: Text = Field(description="What tables and pictures call it.")
    set: Mapping[Text, Any] = Field(min_length=1, description="Field of the recipe, as for `--set` -> value.")


class Sweep(Section):
    """A recipe, and what is varied of it."""

    recipe: LocalPath = Field(description="The recipe that is varied.")
    set: Mapping[Text, Any] = Field(default={}, description="Field -> value, for all points.")
    grid: Mapping[Text, Annotated[ListOf[Any], Field(min_length=1)]] = Field(
        default={}, description="Field of the recipe, as for `--set` -> its values."
    )
    also: ListOf[NamedPoint] = Field(default=(), description="Single points.")
    output: LocalPath | None = Field(default=None, description="Directory for results and shared work.")
    pick: Pick | None = Field(default=None, description="Which point is the best one; null: none is picked.")

    @model_validator(mode="after")
    def _has_points(self) -> Sweep:
        if not self.grid and not self.also:
            raise refusal("varies nothing; give a grid, or points under also")
        return self


@dataclass(frozen=True)
class Point:
    """One variation of the recipe."""

    name: str
    settings: Mapping[str, Any]  # field -> value
    recipe: Recipe


def is_sweep(path: Path) -> bool:
    """Whether a YAML file is a sweep, and not a recipe.

    Raises:
        RecipeError: it cannot be read.
    """
    value = read_yaml_file(path).value
    keys = frozenset(map(str, value)) if isinstance(value, Mapping) else frozenset()
    return not keys.isdisjoint(_OWN_KEYS) and keys.isdisjoint(_KEYS_OF_RECIPES)


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        RecipeError: it cannot be read, or says what it must not; file and line are named.
    """
    root = read_yaml_file(path)
    try:
        return Sweep.model_validate(root.plain())
    except ValidationError as error:
        raise explain(error, root.origin_of, Sweep) from error


def sweep_points(sweep: Sweep) -> list[Point]:
    """Return every point, its recipe validated; equal recipes once.

    Raises:
        RecipeError: a point's recipe is refused, two points have one name, or the smallest that passes the
            gates is to be picked and there are none; the message names the point.
    """
    values = [[(field, value) for value in listed] for field, listed in sweep.grid.items()]
    varied = {field for field, listed in sweep.grid.items() if len(listed) > 1}
    combinations: list[tuple[str, dict[str, Any]]] = []
    for combination in itertools.product(*values) if values else []:
        words = [
            f"{_short_name(field)} {_value_text(value)}" for field, value in combination if field in varied
        ]
        combinations.append((", ".join(words) or "the recipe", dict(combination)))
    combinations += [(point.name, dict(point.set)) for point in sweep.also]
    if len(combinations) > _MOST_POINTS:
        raise RecipeError([f"the sweep has {len(combinations)} points; at most {_MOST_POINTS} are sensible"])
    points: dict[str, Point] = {}
    names = Counter(name for name, _ in combinations)
    for name, settings in combinations:
        overrides = [f"{field}={json.dumps(value)}" for field, value in {**sweep.set, **settings}.items()]
        try:
            recipe = load_recipe(sweep.recipe, overrides)
        except RecipeError as error:
            raise RecipeError([f"point ({name}): {problem}" for problem in error.problems]) from error
        if sweep.pick is not None and sweep.pick.smallest:
            _check_judged(name, recipe)
        points.setdefault(json.dumps(canonical(recipe), sort_keys=True), Point(name, settings, recipe))
    repeated_names = [name for name, count in names.items() if count > 1]
    distinct = [point for point in points.values() if point.name in repeated_names]
    if len(distinct) > len({point.name for point in distinct}):
        raise RecipeError([f"two points are called ({repeated_names[0]}): rename the one under also"])
    return list(points.values())


def _check_judged(name: str, recipe: Recipe) -> None:
    """Refuse to pick the smallest point if no gate that a sweep can judge limits its loss of quality."""
    if recipe.gates is None or recipe.gates.without_export() is None:
        why = "its recipe has no gates" if recipe.gates is None else "a sweep can judge none of its gates"
        raise RecipeError(
            [
                f"point ({name}): pick.smallest takes the smallest that passes the gates, but {why}: give "
                "one on texts or questions, such as gates.perplexity_increase, or pick best_under: SIZE"
            ]
        )


def _short_name(field: str) -> str:
    parts = [part for part in field.split(".") if not part.isdecimal()]
    return parts[-1] if parts[-1] != "stages" else field


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_value_text(item)}" for key, item in value.items())
    return str(value)
