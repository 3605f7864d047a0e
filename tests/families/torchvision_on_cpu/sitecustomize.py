"""Lets torchvision from the package index run beside a PyTorch for CPUs: put this folder on PYTHONPATH.

That torchvision is built for GPUs. Processors of pictures need its Python part alone, which imports if the
module that registers the shapes of its compiled operators is left out. `make test-families` runs with it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

LEFT_OUT = "torchvision._meta_registrations"


class EmptyModule:
    """Finds and loads one module: with nothing in it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return a spec for the one module."""
        return ModuleSpec(name, self) if name == LEFT_OUT else None  # type: ignore[arg-type] # no base class

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


sys.meta_path.insert(0, EmptyModule())
