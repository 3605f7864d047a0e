"""Who imports whom: tests never one another, so that a file can be moved; pipelines in short chains."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

TESTS = Path(__file__).parent
# It counts what all fuzz tests together draw, and so imports them.
COUNTS_ALL = TESTS / "fuzz" / "test_fuzz_total.py"
PIPELINES = TESTS.parent / "pipelines"
LONGEST_CHAIN = 9  # files that a reader opens at most, to follow one import behind the other


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


def imported_when_loaded(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports when it is loaded: not in functions, and not for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            yield from imported_when_loaded(node)


def imports_of_pipelines() -> Mapping[str, frozenset[str]]:
    """Return module of `pipelines` -> those of them that it imports when it is loaded."""
    files = {}
    for file in PIPELINES.rglob("*.py"):
        parts = file.relative_to(TESTS.parent).with_suffix("").parts
        files[".".join(("ercsvd_deploy", *parts)).removesuffix(".__init__")] = file
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    imported = {name: frozenset(imported_when_loaded(tree)) for name, tree in trees.items()}
    return {name: names & (files.keys() - {name}) for name, names in imported.items()}


def test_chains_of_imports_are_short_and_none_is_a_circle() -> None:
    imports = imports_of_pipelines()
    assert len(imports) > 100
    chains: dict[str, tuple[str, ...]] = {}
    for name in TopologicalSorter(imports).static_order():  # raises CycleError
        chains[name] = (name, *max((chains[other] for other in imports[name]), key=len, default=()))
    longest = max(chains.values(), key=len)
    assert len(longest) <= LONGEST_CHAIN, longest
