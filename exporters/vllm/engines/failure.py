"""Find out from vLLM's output why it failed: the exception of the process that failed first.

An engine is a tree of processes. When a worker fails, its engine core fails because it has no worker, and the
parent process because it has no engine core. Each prints a traceback; the last only says that another process
has failed, the first says why.

Lines have three forms: log records `(Worker_TP0 pid=7) ERROR 01-31 12:00:00 [file.py:1] text`, every line of
a traceback with that prefix; plain standard error, to which older releases add `(Worker_TP0 pid=7) `; and
tracebacks that PyTorch prints on GPUs, with `[rank0]: ` before every line. Lines of several processes may
alternate.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

_PREFIX = re.compile(
    r"(?:\((?P<process>[^()]+?) pid=\d+\) )?"
    r"(?:\[(?P<rank>rank\d+)\]:(?: |$))?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<record>\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\]) ?)?"
    r"(?P<text>.*)"
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):"
# An exception after "the direct cause of" only passes the failure on; one that occurred "during handling" is
# the failure itself, and the handled one was an expected exception.
_ANOTHER_OCCURRED = "During handling of the above exception, another exception occurred:"
_PASSED_ON = "The above exception was the direct cause of the following exception:"
_DEATHS = (
    re.compile(
        r"(?:Worker|Engine core) proc (?P<name>\S+) died unexpectedly(?: \(exit code: (?P<code>-?\d+)\))?"
    ),
    re.compile(r"Failed core proc\(s\): \{'(?P<name>[^']+)': (?P<code>-?\d+)"),
)
_FATAL = re.compile(r"Fatal Python error: .*")
_LONGEST_EXCEPTION, _LONGEST_EXCERPT, _LAST_LINES = 12, 80, 15  # lines
_LONGEST_SUMMARY = 400  # characters


@dataclass(frozen=True)
class EngineFailure:
    """The reason of a failure of vLLM.

    Attributes:
        process: vLLM's name of the process that failed first; empty if it is not known.
        exception: Type and message of its exception, or how it ended; may have several lines.
        excerpt: Its output about the failure, such as a traceback.
    """

    process: str
    exception: str
    excerpt: str

    @property
    def summary(self) -> str:
        """Process and exception in one line."""
        return one_line(self.process, self.exception)


@dataclass(frozen=True)
class _Line:
    process: str
    record: str | None  # time and place of its log record; None: plain output
    is_error: bool  # an error's record, or plain output
    text: str


def find_failure(output: str, status: int | None, timeout: float) -> EngineFailure:
    """Return why vLLM failed.

    Args:
        output: The output of all its processes.
        status: Exit status of the started process; None: it was killed at the timeout.
        timeout: The timeout in seconds.
    """
    lines = [_read(line) for line in output.splitlines()]
    failures = (_failure_at(lines, start) for start in range(len(lines)))
    failure = next(filter(None, failures), None)
    last_lines = "\n".join(output.strip().splitlines()[-_LAST_LINES:])
    if status is None:
        timeout_text = f"no answer within {timeout / 60:.0f} minutes"
        if failure is None:
            return EngineFailure("", timeout_text, last_lines)
        return EngineFailure(failure.process, f"{timeout_text}; {failure.exception}", failure.excerpt)
    if failure is not None:
        return failure
    if status < 0:
        return EngineFailure("", _describe_exit(status), last_lines)
    return EngineFailure("", f"exit code {status}, without a traceback", last_lines)


def one_line(process: str, exception: str) -> str:
    """Return in one line of limited length which process failed first, and why."""
    line = " ".join(exception.split())
    if len(line) > _LONGEST_SUMMARY:
        line = f"{line[:_LONGEST_SUMMARY]}..."
    return f"{process}: {line}" if process else line


def _read(line: str) -> _Line:
    match = _PREFIX.fullmatch(_COLOR.sub("", line))
    if match is None:  # a line has no line break, so this is a character that `.` refuses
        return _Line("", None, is_error=True, text=line)
    level = match["level"]
    return _Line(
        match["process"] or match["rank"] or "",
        match["record"],
        level in (None, "ERROR", "CRITICAL"),
        match["text"].rstrip(),
    )


def _failure_at(lines: Sequence[_Line], start: int) -> EngineFailure | None:
    """Return the failure that a line begins to report; None if it reports none."""
    line = lines[start]
    if line.is_error and line.text == _TRACEBACK:
        texts = [line.text for line in _same_output(lines, start)]
        excerpt = _shortened(texts)
        exception = _root_cause(list(_tracebacks(texts)))
        return _death(exception, excerpt) or EngineFailure(_name_of(lines, start), exception, excerpt)
    if fatal := _FATAL.search(line.text):
        return EngineFailure(line.process, fatal[0], _shortened([later.text for later in lines[start:]]))
    return _death(line.text, line.text)


def _death(text: str, excerpt: str) -> EngineFailure | None:
    """Return the failure of a process that died without an exception, if the text reports one."""
    for pattern in _DEATHS:
        if match := pattern.search(text):
            code = match.groupdict().get("code")
            description = "died" if code is None else _describe_exit(int(code))
            return EngineFailure(match["name"], description, excerpt)
    return None


def _shortened(texts: Sequence[str]) -> str:
    excerpt = texts if len(texts) <= _LONGEST_EXCERPT else ["...", *texts[-_LONGEST_EXCERPT:]]
    return "\n".join(excerpt).strip("\n")


def _same_output(lines: Sequence[_Line], start: int) -> Iterator[_Line]:
    """Yield the lines of the record, or of the unbroken output, in which a traceback begins."""
    first = lines[start]
    for line in lines[start:]:
        if line.process == first.process and line.record == first.record:
            yield line
        elif line.process == first.process:
            return  # other output of the same process


@dataclass(frozen=True)
class _Traceback:
    exception: str
    followed_by: str  # the line between it and the next one; empty for the last


def _tracebacks(texts: Sequence[str]) -> Iterator[_Traceback]:
    """Yield the chained exceptions of the first failure in the lines."""
    message: list[str] | None = None  # lines of the current exception's message
    for text in texts:
        if text in (_TRACEBACK, _ANOTHER_OCCURRED, _PASSED_ON):
            if message:
                yield _Traceback(_joined(message), text if text != _TRACEBACK else "")
                if text == _TRACEBACK:
                    return  # another failure
            message = None
        elif message is not None:
            message.append(text)
        elif text and not text[0].isspace():
            message = [text]
    yield _Traceback(_joined(message or ["an exception that was not printed to its end"]), "")


def _root_cause(chain: Sequence[_Traceback]) -> str:
    """Return the exception that caused a chain, see `_ANOTHER_OCCURRED` and `_PASSED_ON`."""
    cause = 0
    while cause + 1 < len(chain) and chain[cause].followed_by == _ANOTHER_OCCURRED:
        cause += 1
    return chain[cause].exception


def _joined(message: Sequence[str]) -> str:
    """Return an exception's first paragraph; after a blank line other output may follow."""
    paragraph = list(takewhile(bool, message))
    return "\n".join(paragraph[:_LONGEST_EXCEPTION]).strip()


def _name_of(lines: Sequence[_Line], start: int) -> str:
    """Return the name of the process that printed a traceback.

    Python's multiprocessing prints `Process NAME:` before the traceback of a process without a prefix.
    """
    if lines[start].process or start == 0:
        return lines[start].process
    match = re.fullmatch(r"Process (\S+):", lines[start - 1].text)
    return match[1] if match else ""


def _describe_exit(status: int) -> str:
    """Return in words how a process with an exit status ended."""
    if status >= 0:
        return f"ended with exit code {status}, without a traceback"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    description = f"was ended by signal {-status} ({name})"
    return (
        f"{description}, as the system does when memory runs out"
        if -status == signal.SIGKILL
        else description
    )
