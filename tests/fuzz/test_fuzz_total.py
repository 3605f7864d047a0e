"""How many cases the fuzz tests draw together; `fuzz.json` below pytest's basetemp counts what they met."""

from __future__ import annotations

from functools import partial

from tests.fuzz import test_fuzz_checkpoints, test_fuzz_command_line, test_fuzz_configs, test_fuzz_data
from tests.fuzz.strategies import CASES, DOCUMENTED, FuzzLog, normalised

MODULES = (test_fuzz_checkpoints, test_fuzz_command_line, test_fuzz_configs, test_fuzz_data)


def test_the_suite_draws_thousands_of_cases() -> None:
    for module in MODULES:
        assert any(name.startswith(f"{module.__name__}.") for name in CASES)
    assert sum(CASES.values()) >= 2500


def test_messages_are_counted_by_what_they_say() -> None:
    log = FuzzLog()

    def refuse(error: Exception) -> None:
        raise error

    for place in ("/a/b/x.json: has 3 of 'q'", "/c/x.json: has 4.5 of 'r s'", "/c/x.json: has none"):
        for error in DOCUMENTED[:2]:
            assert log.attempt("area", partial(refuse, error(place))) is None
    assert log.attempt("area", lambda: 7) == 7
    summary = log.summary()
    assert (summary["cases"], summary["distinct_errors"]) == (7, 4)
    assert summary["areas"]["area"] == {"accepted": 1, "refused": 6, "distinct_errors": 4}
    assert normalised("/a/b/x.json: has 3 of 'q'") == normalised("/d/x.json: has 77 of 'it'")
