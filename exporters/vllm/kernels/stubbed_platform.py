"""Stubs of vLLM's platform for other accelerators, for a process that serves nothing.

vLLM asks one object, `current_platform`, about the machine, and its modules import that object by name.
`StubbedPlatform` replaces it in all of them and can switch between accelerators, so that one slow import of
vLLM is enough for all. vLLM can only choose kernels then, not run them: operators of other accelerators do
not exist here. Never use it in a process that serves a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ercsvd_deploy.exporters.vllm import compatibility


@dataclass(frozen=True)
class Accelerator:
    """An accelerator that a stub can imitate.

    Attributes:
        kind: vLLM's name: CUDA, ROCM or CPU.
        capability: CUDA's compute capability as (major, minor); None without CUDA.
    """

    kind: str
    capability: tuple[int, int] | None = None


class StubbedPlatform:
    """Replaces vLLM's `current_platform`; imitates this machine's own until `become` is called."""

    def __init__(self) -> None:
        """Import vLLM's kernels on the real platform, then replace it."""
        _ = compatibility.choose_mp_linear_kernel  # imports may load operators of the real platform
        self._current: Any = compatibility.current_platform
        self._platforms: dict[Accelerator, Any] = {}
        self.is_cpu_build: bool = self._current.is_cpu()
        compatibility.replace_platform(self)

    def become(self, accelerator: Accelerator) -> None:
        """Imitate another accelerator from now on; a CPU is always this machine's own."""
        if accelerator not in self._platforms:
            self._platforms[accelerator] = compatibility.platform_of(accelerator.kind, accelerator.capability)
        self._current = self._platforms[accelerator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)
