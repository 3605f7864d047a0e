"""Makes vLLM believe that it runs on another accelerator, in a process that serves nothing.

vLLM asks one object, `current_platform`, what the machine is, and its modules hold that object under their
own names. `StubbedPlatform` stands in its place everywhere and can be told time and again which accelerator
to play, so that one import of vLLM, which is slow, answers for all of them. Only questions can be answered:
no operator of another accelerator exists here. Never use it in a process that serves a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ercsvd_deploy.exporters.vllm import compatibility


@dataclass(frozen=True)
class Accelerator:
    """What vLLM can be told to run on.

    Attributes:
        kind: vLLM's name: CUDA, ROCM or CPU.
        capability: CUDA's compute capability as (major, minor); None where there is no such thing.
    """

    kind: str
    capability: tuple[int, int] | None = None


class StubbedPlatform:
    """Stands in the place of vLLM's `current_platform`; plays this machine's own until `become` is called."""

    def __init__(self) -> None:
        """Import vLLM's kernels on the platform that is there, then take its place."""
        _ = compatibility.choose_mp_linear_kernel  # what it imports may load operators of the real platform
        self._played: Any = compatibility.current_platform
        self._platforms: dict[Accelerator, Any] = {}
        self.is_cpu_build: bool = self._played.is_cpu()
        compatibility.replace_platform(self)

    def become(self, accelerator: Accelerator) -> None:
        """Play another accelerator from now on; a CPU is always this machine's own."""
        if accelerator not in self._platforms:
            self._platforms[accelerator] = compatibility.platform_of(accelerator.kind, accelerator.capability)
        self._played = self._platforms[accelerator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._played, name)
