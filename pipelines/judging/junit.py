"""Gate verdicts as JUnit XML, which CI systems display."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from junitparser import Failure, JUnitXml, TestCase, TestSuite

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.gates import GateResult

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(results: Iterable[GateResult], title: str) -> str:
    """Return verdicts as JUnit XML, one test case for each gate and subject."""
    suite = TestSuite(_printable(title))
    for result in results:
        case = TestCase(_printable(result.subject or "model"), classname=f"gates.{result.gate}")
        if not result.passed:
            kind = "GateMissed" if result.verdict == "missed" else "GateUndecided"
            case.result = [Failure(_printable(result.explain()), kind)]
        # The verdict and its interval, also where nothing failed.
        case.system_out = _printable(f"{result.verdict}: {result.explain()}")
        suite.add_testcase(case)
    document = JUnitXml("ercsvd gates")
    document.add_testsuite(suite)
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return text.decode("utf-8")


def _printable(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)
