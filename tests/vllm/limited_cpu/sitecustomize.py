"""On PYTHONPATH: torch says that this CPU has fewer instructions, so that vLLM loads another of its builds.

`ERCSVD_TEST_CPU=avx2` hides AVX-512, `avx512` its BF16 part. Python imports this file at start-up, in every
child process too; torch is patched when it is imported.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_HIDDEN = {
    "avx2": ("_is_avx512_supported", "_is_avx512_bf16_supported"),
    "avx512": ("_is_avx512_bf16_supported",),
}


class _TorchPatch(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hide(module: ModuleType) -> None:
            execute(module)
            for name in _HIDDEN[os.environ["ERCSVD_TEST_CPU"]]:
                setattr(module, name, lambda: False)

        spec.loader.exec_module = execute_and_hide  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _TorchPatch())
