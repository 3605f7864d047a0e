"""Find in what vLLM printed why it failed: the exception of the process that failed first.

An engine is a tree of processes. When a worker fails, the engine core above it fails for want of a worker,
and the process above that for want of an engine core; each prints a traceback, the last of which says nothing
but that something failed further up. The first says why.

Lines come in two forms: records `(Worker_TP0 pid=7) ERROR 01-31 12:00:00 [file.py:1] text`, every line of a
traceback with that prefix, and what goes to standard error as it is, which older releases put behind
`(Worker_TP0 pid=7) `. Lines of several processes may alternate.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

_PREFIX = re.compile(
    r"(?:\((?P<process>[^()]+?) pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<record>\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\]) ?)?"
    r"(?P<text>.*)"
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):"
# A traceback that follows "the direct cause of" only passes the failure on; one that arose "during handling"
# is the failure itself, and what was being handled an attempt that was expected to fail.
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
    """Why vLLM failed.

    Attributes:
        process: Name of the process that failed first, as vLLM calls it; empty where that is not known.
        exception: Type and message of its exception, or how it died; may have several lines.
        excerpt: What it printed about that, its traceback say, as preformatted text.
    """

    process: str
    exception: str
    excerpt: str

    @property
    def summary(self) -> str:
        """Process and exception on one line."""
        return one_line(self.process, self.exception)


@dataclass(frozen=True)
class _Line:
    process: str
    record: str | None  # time and place of the record it belongs to; None: no record
    is_error: bool  # or no record
    text: str


def find_failure(printed: str, status: int | None, patience: float) -> EngineFailure:
    """Return why vLLM failed.

    Args:
        printed: All that its processes printed.
        status: Exit status of the process that was started; None: it was ended, because it took too long.
        patience: How many seconds it was given.
    """
    lines = [_read(line) for line in printed.splitlines()]
    found = next((failure for start in range(len(lines)) if (failure := _failure_at(lines, start))), None)
    last = "\n".join(printed.strip().splitlines()[-_LAST_LINES:])
    if status is None:
        late = f"no answer within {patience / 60:.0f} minutes"
        if found is None:
            return EngineFailure("", late, last)
        return EngineFailure(found.process, f"{late}; {found.exception}", found.excerpt)
    if found is not None:
        return found
    if status < 0:
        return EngineFailure("", _describe_exit(status), last)
    return EngineFailure("", f"exit code {status}, without a traceback", last)


def one_line(process: str, exception: str) -> str:
    """Return on one line, not too long, which process failed first and why."""
    line = " ".join(exception.split())
    if len(line) > _LONGEST_SUMMARY:
        line = f"{line[:_LONGEST_SUMMARY]}..."
    return f"{process}: {line}" if process else line


def _read(line: str) -> _Line:
    found = _PREFIX.fullmatch(_COLOR.sub("", line))
    if found is None:  # a line has no line break, so this is a character that `.` refuses
        return _Line("", None, is_error=True, text=line)
    level = found["level"]
    return _Line(
        found["process"] or "", found["record"], level in (None, "ERROR", "CRITICAL"), found["text"].rstrip()
    )


def _failure_at(lines: Sequence[_Line], start: int) -> EngineFailure | None:
    """Return the failure that a line begins to tell of; None if it does not."""
    line = lines[start]
    if line.is_error and line.text == _TRACEBACK:
        mine = [belonging.text for belonging in _belonging(lines, start)]
        excerpt = _shortened(mine)
        exception = _root_cause(list(_tracebacks(mine)))
        return _death(exception, excerpt) or EngineFailure(_name_of(lines, start), exception, excerpt)
    if fatal := _FATAL.search(line.text):
        return EngineFailure(line.process, fatal[0], _shortened([later.text for later in lines[start:]]))
    return _death(line.text, line.text)


def _death(text: str, excerpt: str) -> EngineFailure | None:
    """Return what a text says of a process that died without an exception; None if nothing."""
    for pattern in _DEATHS:
        if said := pattern.search(text):
            code = said.groupdict().get("code")
            how = "died" if code is None else _describe_exit(int(code))
            return EngineFailure(said["name"], how, excerpt)
    return None


def _shortened(texts: Sequence[str]) -> str:
    shown = texts if len(texts) <= _LONGEST_EXCERPT else ["...", *texts[-_LONGEST_EXCERPT:]]
    return "\n".join(shown).strip("\n")


def _belonging(lines: Sequence[_Line], start: int) -> Iterator[_Line]:
    """Yield the lines of the record, or of the unbroken output, in which a traceback begins."""
    first = lines[start]
    for line in lines[start:]:
        if line.process == first.process and line.record == first.record:
            yield line
        elif line.process == first.process:
            return  # the same process goes on to something else


@dataclass(frozen=True)
class _Traceback:
    exception: str
    followed_by: str  # how the next one came about; empty for the last


def _tracebacks(texts: Sequence[str]) -> Iterator[_Traceback]:
    """Yield the chain of exceptions in the lines from the first traceback on."""
    message: list[str] | None = None  # of the exception whose lines are being read
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
    """Return the exception that a chain is about: what was handled before it, or what it only passes on."""
    chosen = 0
    while chosen + 1 < len(chain) and chain[chosen].followed_by == _ANOTHER_OCCURRED:
        chosen += 1
    return chain[chosen].exception


def _joined(message: Sequence[str]) -> str:
    """Return an exception's first paragraph: what follows a blank line may be the next thing printed."""
    paragraph = list(takewhile(bool, message))
    return "\n".join(paragraph[:_LONGEST_EXCEPTION]).strip()


def _name_of(lines: Sequence[_Line], start: int) -> str:
    """Return the name of the process that printed a traceback.

    Python's multiprocessing says `Process NAME:` before the traceback of a process without such a prefix.
    """
    if lines[start].process or start == 0:
        return lines[start].process
    announced = re.fullmatch(r"Process (\S+):", lines[start - 1].text)
    return announced[1] if announced else ""


def _describe_exit(status: int) -> str:
    """Return in words how a process ended, of which nothing else is known."""
    if status >= 0:
        return f"ended with exit code {status}, without a traceback"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    said = f"was ended by signal {-status} ({name})"
    return f"{said}, as the system does when memory runs out" if -status == signal.SIGKILL else said
