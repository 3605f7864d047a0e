"""Which errors of libraries mean that memory was not enough, and of which kind."""

from __future__ import annotations

# What torch's own allocators and the libraries under them say; not all of it is an error class of its own.
_ON_GPU = ("CUDA out of memory", "CUDA error: out of memory", "HIP out of memory", "STATUS_ALLOC_FAILED")
_ON_HOST = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def exhausted_memory(error: BaseException) -> str | None:
    """Return "GPU memory" or "memory" if an error says that it was not enough; None for any other error."""
    said = str(error)
    if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _ON_GPU):
        return "GPU memory"
    if isinstance(error, MemoryError) or any(words in said for words in _ON_HOST):
        return "memory"
    return None


def first_sentence(error: BaseException) -> str:
    """Return what a library says first; it goes on for many lines."""
    text = str(error).strip().split("\n", 1)[0]
    return text.split(". ", 1)[0].rstrip(".") or type(error).__name__
