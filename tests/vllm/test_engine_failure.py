"""Why vLLM failed, read from what it printed: real logs of several releases, and what they may look like."""

from __future__ import annotations

import pytest

from ercsvd_deploy.exporters.vllm.engines.failure import find_failure, one_line

FIRST = "KeyError: 'first'"
TRACEBACK = "Traceback (most recent call last):"
PASSED_ON = "The above exception was the direct cause of the following exception:"


def record(
    process: str, text: str, place: str = "core.py:9", level: str = "ERROR", time: str = "12:00:00"
) -> str:
    """Return a message as vLLM logs it: every line with the whole prefix."""
    prefix = f"({process} pid=7) {level} 01-31 {time} [{place}] "
    return "\n".join(prefix + line for line in text.splitlines())


def failure_in(*parts: str, status: int | None = 1) -> tuple[str, str]:
    found = find_failure("\n".join(parts), status, 3600.0)
    return found.process, found.exception


def trace(exception: str, file: str = "a.py") -> str:
    return f'{TRACEBACK}\n  File "{file}", line 1, in f\n    g()\n    ^^^\n{exception}'


ENGINE_FAILED = trace(
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)


def test_the_worker_comes_before_those_above_it() -> None:
    printed = [
        record("Worker_TP1", "WorkerProc failed to start.\n" + trace("ValueError: the cause")),
        record("EngineCore", trace("Exception: WorkerProc initialization failed")),
        ENGINE_FAILED,
    ]
    assert failure_in(*printed) == ("Worker_TP1", "ValueError: the cause")


def test_lines_of_two_processes_alternate() -> None:
    one = record("Worker_TP0", trace("ValueError: of the first")).splitlines()
    other = record("Worker_TP1", trace("KeyError: 'of the second'")).splitlines()
    mixed = [line for pair in zip(one, other, strict=True) for line in pair]
    assert failure_in(*mixed) == ("Worker_TP0", "ValueError: of the first")


def test_a_message_of_several_lines_ends_with_its_record() -> None:
    printed = [
        record("Worker", trace("CheckpointError: 2 problems:\n  missing: a\n  surplus: b")),
        record("Worker", "shutting down", place="multiproc.py:3"),
        ENGINE_FAILED,
    ]
    assert failure_in(*printed) == ("Worker", "CheckpointError: 2 problems:\n  missing: a\n  surplus: b")


def test_an_earlier_record_of_the_same_process_is_another() -> None:
    harmless = record("Worker", trace("ImportError: a library that need not be there"), level="WARNING")
    assert failure_in(harmless, record("Worker", trace("ValueError: the cause"))) == (
        "Worker",
        "ValueError: the cause",
    )


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (PASSED_ON, FIRST),
        ("During handling of the above exception, another exception occurred:", "OSError: second"),
    ],
)
def test_chains(between: str, expected: str) -> None:
    chain = f"{trace(FIRST)}\n\n{between}\n\n{trace('OSError: second')}"
    assert failure_in(chain) == ("", expected)
    assert failure_in(record("EngineCore", chain), ENGINE_FAILED) == ("EngineCore", expected)


def test_output_that_is_no_record() -> None:
    older = "\n".join(
        f"(EngineCore_DP0 pid=8) {line}" for line in trace("ValueError: the cause").splitlines()
    )
    assert failure_in(older, ENGINE_FAILED) == ("EngineCore_DP0", "ValueError: the cause")
    announced = f"Process EngineCore:\n{trace('ValueError: the cause')}\n[rank0] destroying\n"
    assert failure_in(announced)[0] == "EngineCore"
    assert failure_in(announced)[1].startswith("ValueError: the cause")


def test_tracebacks_with_a_rank() -> None:
    said = trace("ValueError: the cause").splitlines()
    printed = [
        *(f"[rank0]: {line}" for line in said),
        "[rank0]:[W1127 22:13:39.7 x.cpp:1] Warning: not destroyed",
    ]
    assert failure_in("\n".join(printed)) == ("rank0", "ValueError: the cause")
    chain = [
        *printed[:-1],
        "[rank0]:",
        f"[rank0]: {PASSED_ON}",
        "[rank0]:",
        *printed[:-2],
        "[rank0]: OSError: second",
    ]
    assert failure_in("\n".join(chain)) == ("rank0", "ValueError: the cause")
    named = "\n".join(f"(Worker_TP1 pid=9) [rank1]: {line}" for line in said)
    assert failure_in(named, ENGINE_FAILED) == ("Worker_TP1", "ValueError: the cause")


def test_colors() -> None:
    printed = record("Worker", trace("ValueError: the cause")).replace(
        "(Worker pid=7)", "\x1b[0;36m(Worker pid=7)\x1b[0;0m"
    )
    assert failure_in(printed) == ("Worker", "ValueError: the cause")


@pytest.mark.parametrize(
    ("said", "process", "how"),
    [
        (
            "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
            "VllmWorker-1",
            "SIGKILL",
        ),
        ("Worker proc VllmWorker-0 died unexpectedly, shutting down executor.", "VllmWorker-0", "died"),
        (
            "Engine core proc EngineCore_DP0 died unexpectedly, shutting down client.",
            "EngineCore_DP0",
            "died",
        ),
        (
            "Worker proc VllmWorker-1 died unexpectedly (exit code: -4), x.",
            "VllmWorker-1",
            "signal 4 (SIGILL)",
        ),
        ("Worker proc VllmWorker-1 died unexpectedly (exit code: 3), x.", "VllmWorker-1", "exit code 3"),
    ],
)
def test_deaths_without_an_exception(said: str, process: str, how: str) -> None:
    found = failure_in(
        record("EngineCore", said), record("EngineCore", trace("RuntimeError: cancelled")), ENGINE_FAILED
    )
    assert found[0] == process
    assert how in found[1]


def test_a_core_that_died_silently_is_named_by_the_process_above() -> None:
    parent = trace(
        "RuntimeError: Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {'EngineCore': -9}"
    )
    process, exception = failure_in(parent)
    assert process == "EngineCore"
    assert "signal 9 (SIGKILL), as the system does when memory runs out" in exception


def test_an_exception_before_a_death_is_the_cause() -> None:
    printed = [
        record("Worker_TP0", trace("ValueError: the cause")),
        record("EngineCore", "Worker proc VllmWorker-0 died unexpectedly (exit code: 1), x."),
    ]
    assert failure_in(*printed) == ("Worker_TP0", "ValueError: the cause")


def test_a_crash_of_the_interpreter() -> None:
    printed = (
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n  File x"
    )
    found = find_failure(printed, -11, 60.0)
    assert found.exception == "Fatal Python error: Segmentation fault"
    assert "most recent call first" in found.excerpt


def test_nothing_said() -> None:
    assert failure_in("", status=-9)[1].startswith("was ended by signal 9 (SIGKILL)")
    assert failure_in("some line", status=2) == ("", "exit code 2, without a traceback")
    lines = "\n".join(map(str, range(100)))
    assert find_failure(lines, 2, 60.0).excerpt.splitlines() == [str(line) for line in range(85, 100)]


def test_too_late() -> None:
    assert failure_in("loading", status=None) == ("", "no answer within 60 minutes")
    process, exception = failure_in(record("Worker", trace("ValueError: the cause")), status=None)
    assert (process, exception) == ("Worker", "no answer within 60 minutes; ValueError: the cause")


def test_an_excerpt_keeps_its_end() -> None:
    frames = "\n".join(f'  File "{number}.py", line 1, in f' for number in range(200))
    found = find_failure(f"{TRACEBACK}\n{frames}\nValueError: the cause\n", 1, 60.0)
    assert found.exception == "ValueError: the cause"
    assert found.excerpt.startswith("...")
    assert found.excerpt.endswith("ValueError: the cause")
    assert len(found.excerpt.splitlines()) <= 81


def test_one_line() -> None:
    assert one_line("Worker", "ValueError: a\n  b\nc") == "Worker: ValueError: a b c"
    assert one_line("", "x" * 1000) == "x" * 400 + "..."
