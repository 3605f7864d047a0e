"""Fixtures of the judging tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ercsvd_deploy.exporters.vllm.engines.machine import ServingMachine
from ercsvd_deploy.pipelines.judging.parity import measure as serving_parity
from tests.judging.vllm_stand_in import StandIn


@pytest.fixture
def in_place_of_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    """Return what puts a stand-in where vLLM is asked, on a machine with two cores."""

    def put(made: StandIn | None = None, **settings: Any) -> StandIn:
        made = made or StandIn(**settings)
        monkeypatch.setattr(serving_parity, "score_with_vllm", made)
        monkeypatch.setattr(serving_parity, "find_machine", lambda: ServingMachine(0, (0, 1)))
        monkeypatch.setattr(serving_parity, "find_spec", lambda _name: object())
        return made

    return put
