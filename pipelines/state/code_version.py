"""The code that a stage's result depends on: its own file, and its imports from the rooms that compute.

Docstrings, comments, messages of errors and descriptions of fields do not count, nor do planning, reports and
the command line: a better message must not invalidate hours of computation. Nor does what only decides which
storages are on offer and what they cost: the stage that chooses has a digest of those in its settings.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import ercsvd_deploy

_PACKAGE = "ercsvd_deploy"
_COMPUTING = (
    "budget",
    "data",
    "evaluation",
    # What tensors and words of integers are called and hold, and the weights that are read.
    "format.files.stacked_matrices",
    "format.files.store_views",
    "format.integer_words",
    "format.llava_names",
    "format.packing",
    "format.schema",
    "format.storage",
    "format.stored_names",
    "linalg",
    "models",
    "quantization",
    "pipelines.stages",
)
# Module -> what counts for it besides: how files are written, for the stage that writes an export.
_COMPUTING_TOO = {
    f"{_PACKAGE}.pipelines.stages.export": (
        "exporters.vllm.directory",
        "format.auto_round",
        "format.compressed_tensors",
        "format.files",
        "format.stock_formats",
    )
}
# Modules of the stages' room that only plan and run stages.
_RUNNING = frozenset(
    f"{_PACKAGE}.pipelines.stages.{name}" for name in ("cached", "contract", "sizes", "stage_run", "workload")
)


@functools.cache
def code_version(module: str) -> str:
    """Return a digest of a module of this package and of all it imports from the rooms that compute.

    Args:
        module: Full name of the module; for a module of another package the result is "".
    """
    if _file_of(module) is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(_needed_by(module)):
        digest.update(f"{name} {_parsed(name)[0]}\n".encode())
    return digest.hexdigest()


def _needed_by(module: str) -> set[str]:
    """Return a module and all computing modules that it imports, directly or indirectly."""
    rooms = [f"{_PACKAGE}.{room}" for room in (*_COMPUTING, *_COMPUTING_TOO.get(module, ()))]
    needed, unparsed = {module}, [module]
    while unparsed:
        imported = {name for name in _parsed(unparsed.pop())[1] if _counts(name, rooms)} - needed
        needed |= imported
        unparsed += imported
    return needed


def _counts(name: str, rooms: Iterable[str]) -> bool:
    is_computing = any(name == room or name.startswith(f"{room}.") for room in rooms)
    return is_computing and name not in _RUNNING and _file_of(name) is not None


@functools.cache
def _parsed(module: str) -> tuple[str, frozenset[str]]:
    """Return a digest of a module's code without prose, and the names that it imports."""
    file = _file_of(module)
    assert file is not None, "only modules of this package are read"
    tree = ast.parse(file.read_bytes())
    imported = frozenset(_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _remove_docstring(node)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def _remove_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first_statement = node.body[0] if node.body else None
    if (
        isinstance(first_statement, ast.Expr)
        and isinstance(first_statement.value, ast.Constant)
        and isinstance(first_statement.value.value, str)
    ):
        del node.body[0]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path | None:
    """Return the file of a module of this package; None if there is none."""
    package, *parts = module.split(".")
    if package != _PACKAGE:
        return None
    path = Path(ercsvd_deploy.__file__).parent.joinpath(*parts)
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in files if parts and file.is_file()), None)
