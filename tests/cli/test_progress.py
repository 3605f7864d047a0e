"""Progress of long work: the time left against plain arithmetic, lines off a terminal, bars on one."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from ercsvd_deploy.pipelines.cli.messages import shown_on
from ercsvd_deploy.pipelines.cli.progress import LINES, Pace, reporter


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def after_steps(clock: Clock, pace: Pace, *seconds: float) -> None:
    for each in seconds:
        clock.now += each
        pace.step()


def test_time_left_is_known_once_the_first_step_is_done() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    clock.now += 5
    assert pace.remaining is None
    assert pace.elapsed == 5
    after_steps(clock, pace, 5)
    assert pace.remaining == pytest.approx(30)  # three more of ten seconds each
    clock.now += 4
    assert pace.remaining == pytest.approx(26)
    clock.now += 100
    assert pace.remaining == 0


def test_what_an_earlier_run_had_finished_does_not_count_as_fast_work() -> None:
    clock = Clock()
    pace = Pace(60, clock)
    after_steps(clock, pace, *[0.0] * 30, *[10.0] * 8)
    assert pace.remaining == pytest.approx(22 * 10)


def test_off_a_terminal_every_step_is_a_line_with_the_time_left() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    with shown_on(console, logging.INFO), reporter(console, with_bars=False)("erc_svd", 3) as step:
        for _ in range(3):
            step()
    first, *steps = shown.getvalue().splitlines()
    assert first == "erc_svd: begins"
    assert [line.split(",")[0] for line in steps] == [f"erc_svd: {done}/3" for done in (1, 2, 3)]
    assert ["left" in line for line in steps] == [True, True, False]


def test_a_terminal_has_bars_and_the_log_has_the_lines(caplog: pytest.LogCaptureFixture) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True)
    with (
        caplog.at_level(logging.INFO, LINES),
        shown_on(console, logging.INFO, hidden=LINES),
        reporter(console, with_bars=True)("erc_svd, 14 candidates", 16) as step,
    ):
        step()
    assert "━" in shown.getvalue()
    assert "1/16" in shown.getvalue()
    assert "left" in shown.getvalue()
    assert "1/16, " not in shown.getvalue().replace("1/16 ", "")
    assert caplog.messages[0] == "erc_svd, 14 candidates: begins"
    assert caplog.messages[1].startswith("erc_svd, 14 candidates: 1/16, 0:00:0")
