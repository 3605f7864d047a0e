"""Lets vLLM serve LLaVA where torchvision is not installed: put this folder on PYTHONPATH.

vLLM's LLaVA imports its Pixtral, for a class that LLaVA never uses; Pixtral imports one function from a
module of transformers that needs torchvision. transformers has a twin of that module that needs only PIL,
with the same function. Python runs this file in every process that inherits PYTHONPATH, and so in all of
vLLM's, where it answers an import of the first module with the contents of the second.

For demonstrations and tests on a CPU only: torchvision has no CPU build in the package index. On a machine
with a GPU install torchvision, which vLLM requires there; then nothing here takes effect.

It costs a process a millisecond: torchvision is searched, and transformers imported, only when the module is
imported.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

NEEDS_TORCHVISION = "transformers.models.pixtral.image_processing_pixtral"
NEEDS_PIL = "transformers.models.pixtral.image_processing_pil_pixtral"


class PilTwin:
    """Import hook for one module, which it loads as a copy of its twin."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return a spec for the one module, if torchvision is missing."""
        if name != NEEDS_TORCHVISION:
            return None
        from importlib.util import find_spec

        if find_spec("torchvision"):
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type] # a loader without its base class's import

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: Python then creates an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module the twin's contents, under the module's own name."""
        twin = vars(importlib.import_module(NEEDS_PIL))
        vars(module).update({name: value for name, value in twin.items() if not name.startswith("__")})


def shadowed() -> ModuleSpec | None:
    """Return the sitecustomize that this one hides, if there is one."""
    is_later = False
    for entry in sys.path:
        spec = PathFinder.find_spec("sitecustomize", [entry])
        if spec is None or not spec.has_location:
            continue
        if spec.origin == __file__:
            is_later = True
        elif is_later:
            return spec
    return None


def run(spec: ModuleSpec) -> None:
    """Execute a module that cannot be imported by its name."""
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)


sys.meta_path.insert(0, PilTwin())
if hidden := shadowed():
    run(hidden)
