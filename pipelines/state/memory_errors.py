"""Recognise the errors of libraries that mean too little memory, on the GPU or on the host."""

from __future__ import annotations

# Messages of torch's allocators and of the libraries under it; not all have their own error class.
_ON_GPU = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP out of memory",
    "STATUS_ALLOC_FAILED",
)
_ON_HOST = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def exhausted_memory(error: BaseException) -> str | None:
    """Return "GPU memory" or "memory", whichever an error says was exhausted; None for any other error."""
    message = str(error)
    if type(error).__name__ == "OutOfMemoryError" or any(words in message for words in _ON_GPU):
        return "GPU memory"
    if isinstance(error, MemoryError) or any(words in message for words in _ON_HOST):
        return "memory"
    return None


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's long error message."""
    text = str(error).strip().split("\n", 1)[0]
    return text.split(". ", 1)[0].rstrip(".") or type(error).__name__
