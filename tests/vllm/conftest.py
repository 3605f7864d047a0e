"""Engines of these tests run on GPUs where there are any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpus import found_gpus


@pytest.fixture(autouse=True, scope="module")
def _engines_find_gpus() -> Iterator[None]:
    with found_gpus():
        yield
