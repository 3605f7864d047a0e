"""What the fuzz tests share: damaged bytes and structures, and the one property that all of them check.

Every case either works or is refused by an exception of this project's own, in words. Any other exception
fails the test. Cases are drawn from a fixed seed: the same ones in every run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ercsvd_deploy.data.texts import CalibrationError
from ercsvd_deploy.format.files.manifest import ManifestError
from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.format.schema import CheckpointFormatError
from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.pipelines.reporting.report.check import CheckError
from ercsvd_deploy.pipelines.reporting.report.document import ReportError
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlanError
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import RecipeError

DOCUMENTED = (
    ArchitectureError,
    CalibrationError,
    CheckError,
    ReportError,
    CheckpointError,
    CheckpointFormatError,
    ManifestError,
    PlanError,
    QuantizePlanError,
    RecipeError,
)
# Test -> cases it draws; `tests/fuzz/test_fuzz_total.py` adds them up.
CASES: dict[str, int] = {}
Result = TypeVar("Result")
Test = TypeVar("Test", bound=Callable[..., None])


def cases(number: int) -> Callable[[Test], Test]:
    """Run a test on `number` drawn cases, the same ones every time."""

    def decorate(test: Test) -> Test:
        CASES[f"{test.__module__}.{test.__name__}"] = number
        drawn = settings(
            max_examples=number,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        return drawn(test)

    return decorate


@dataclass
class FuzzLog:
    """What became of the cases.

    Attributes:
        accepted: Area -> cases that worked.
        refused: Area and normalised message -> cases.
    """

    accepted: Counter[str] = field(default_factory=Counter, repr=False)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter, repr=False)

    def attempt(self, area: str, action: Callable[[], Result], named: str = "") -> Result | None:
        """Return what `action` gives; None if it refuses, naming `named`. Other exceptions are defects."""
        try:
            result = action()
        except DOCUMENTED as error:
            message = str(error)
            assert message.strip()
            assert named in message, message
            self.refuse(area, f"{type(error).__name__}: {message}")
            return None
        self.accepted[area] += 1
        return result

    def refuse(self, area: str, message: str) -> None:
        """Count a refusal."""
        self.refused[area, normalised(message)] += 1

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        areas = sorted({*self.accepted, *(area for area, _ in self.refused)})
        return {
            "cases": self.accepted.total() + self.refused.total(),
            "distinct_errors": len({message for _, message in self.refused}),
            "areas": {
                area: {
                    "accepted": self.accepted[area],
                    "refused": sum(count for (of, _), count in self.refused.items() if of == area),
                    "distinct_errors": sum(of == area for of, _ in self.refused),
                }
                for area in areas
            },
            "messages": sorted({message for _, message in self.refused}),
        }


def normalised(message: str) -> str:
    """Return how a message begins, without what differs from case to case: names, values, places."""
    line = message.strip().splitlines()[0].partition("; ")[0]
    line = re.sub(r"/\S+/", "", line)
    line = re.sub(r"\S*safetensor\S*", "FILE", line)
    line = re.sub(r"(quantization_config\.|is damaged: )[^:]*(?=: )", r"\1FIELD", line)
    line = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", line)
    line = re.sub(r"[\[{].*[\]}]", "[…]", line)
    line = re.sub(r"[0#]x[0-9a-f]+", "#", line)
    line = re.sub(r"-?\d[\d,.]*(?:[eE][-+]?\d+)?", "#", line)
    return line.encode("ascii", "replace").decode()[:120]


EXTREMES = st.sampled_from(
    [
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        -(2**63),
        10**9,
        10**12,
        10**30,
        10**400,
        1e308,
        -0.5,
        float("nan"),
        float("inf"),
    ]
)
WORDS = st.sampled_from(
    ["", ".", "..", "/etc/passwd", "../x.safetensors", "a\0b", "\ud800", "x" * 300, "auto", "None", "🦙"]
) | st.sampled_from(
    ["llama", "opt", "llava", "clip_vision_model", "dense", "low_rank", "pivoted", "F32", "I8"]
)
SCALARS = st.none() | st.booleans() | EXTREMES | st.integers(-5, 300) | WORDS | st.text(max_size=4)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return `whole` with bits flipped, cut short, with bytes put in, left out, repeated or all replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat", "replace"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del data[place : place + length]
            case "repeat":
                data[place:place] = data[place : place + length] * draw(st.integers(1, 50))
            case _:
                data = bytearray(draw(st.binary(max_size=40)))
    return bytes(data)


@st.composite
def damaged_values(draw: st.DrawFn, whole: Any) -> Any:
    """Return JSON values with a few entries replaced, removed, added, doubled or exchanged."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_containers(value))
        if not places or not draw(st.integers(0, 40)):
            return draw(JSON_VALUES)
        place = draw(st.sampled_from(places))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "exchange"])):
            case "replace":
                place[key] = draw(JSON_VALUES)
            case "remove":
                del place[key]
            case "add" if isinstance(place, dict):
                place[draw(WORDS | st.text(max_size=6))] = draw(JSON_VALUES)
            case "add":
                place.insert(key, draw(JSON_VALUES))
            case _:
                other = draw(st.sampled_from(keys))
                place[key], place[other] = place[other], place[key]
    return value


def _containers(value: Any) -> Iterator[Any]:
    """Yield every mapping and list within that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


def as_json(value: Any) -> bytes:
    """Return JSON text as a careless program might write it: with NaN, and halves of surrogate pairs."""
    return json.dumps(value).encode()


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Return path -> (size, time of change) of everything below a directory, to see what was written."""
    return {
        path.relative_to(directory).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
    }
