"""Whether tests find the GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_VISIBLE = os.environ.get(_VARIABLE)
_ARE_AVAILABLE: Callable[[], bool] = torch.cuda.is_available
_COUNT: Callable[[], int] = torch.cuda.device_count


@contextmanager
def hidden_gpus() -> Iterator[None]:
    """Let this process, and what it starts, find none."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        patched.setenv(_VARIABLE, "")
        yield


@contextmanager
def found_gpus() -> Iterator[None]:
    """Let this process, and what it starts, find those that there are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", _ARE_AVAILABLE)
        patched.setattr(torch.cuda, "device_count", _COUNT)
        if _VISIBLE is None:
            patched.delenv(_VARIABLE, raising=False)
        else:
            patched.setenv(_VARIABLE, _VISIBLE)
        yield
