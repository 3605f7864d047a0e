"""The ready recipes and sweeps that come with the package. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ercsvd_deploy
from ercsvd_deploy.recipe.fields import RecipeError, did_you_mean

FOLDER = Path(ercsvd_deploy.__file__).parent / "recipes"
_NO_WORDS = ("yaml-language-server",)


@dataclass(frozen=True)
class ReadyRecipe:
    """A file that comes with the package.

    Attributes:
        name: Its name for the command line, such as `llama-3-8b` or `sweeps/tiny-llama`.
        about: The first sentence of its comment.
        kind: "recipe" or "sweep".
        file: Its path.
    """

    name: str
    about: str
    kind: str
    file: Path


def ready_recipes() -> list[ReadyRecipe]:
    """Return all ready recipes and sweeps, recipes first."""
    files = [*sorted(FOLDER.glob("*.yaml")), *sorted(FOLDER.glob("*/*.yaml"))]
    return [
        ReadyRecipe(
            name=file.relative_to(FOLDER).with_suffix("").as_posix(),
            about=_about(file),
            kind="recipe" if file.parent == FOLDER else "sweep",
            file=file,
        )
        for file in files
    ]


def find_ready(name: str | None) -> Path:
    """Return the file of a ready recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    files = {recipe.name: recipe.file for recipe in ready_recipes()}
    plain_name = (name or "").removesuffix(".yaml").removeprefix("recipes/")
    if plain_name not in files:
        close = did_you_mean(plain_name, files)
        remedy = f"did you mean {close}?" if close else f"there are {', '.join(files)}"
        raise RecipeError([f"no ready recipe is called {plain_name!r}; {remedy}"])
    return files[plain_name]


def _about(file: Path) -> str:
    """Return the first sentence of a file's comment."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not text.startswith(_NO_WORDS):
            lines.append(text)
    words = " ".join(lines).strip()
    end = min((words.find(mark) for mark in (". ", ": ", "; ") if mark in words), default=len(words))
    return words[:end].rstrip(".:")
