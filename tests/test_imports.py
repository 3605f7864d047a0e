"""Tests import builders and references, never one another: a file of tests can be moved or split at will."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
# It counts what all fuzz tests together draw, and so imports them.
COUNTS_ALL = TESTS / "fuzz" / "test_fuzz_total.py"


def imported_modules(file: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_module_is_imported_by_another() -> None:
    modules = {
        ".".join(file.relative_to(TESTS.parent).with_suffix("").parts) for file in TESTS.rglob("test_*.py")
    }
    assert len(modules) > 50
    found = {
        f"{file.relative_to(TESTS)} imports {name}"
        for file in TESTS.rglob("*.py")
        if file != COUNTS_ALL
        for name in imported_modules(file)
        for module in modules
        if name == module or name.startswith(f"{module}.")
    }
    assert not found
