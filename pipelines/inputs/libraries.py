"""The first import of transformers' model classes, without unrelated warnings of other libraries."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_WITH_HANDLERS = ("huggingface_hub", "torch", "transformers")  # write to standard error by themselves


@functools.cache
def import_transformers() -> None:
    """Import the transformers module that builds models.

    Where the program has set up logging, the libraries' messages go there instead of to their own handlers.

    The import loads torchao where that is installed. torchao then warns that it cannot load kernels for other
    GPUs than this machine's, and torch that torchao registers its Enums in an old way. Nothing here runs
    torchao's kernels, so the two loggers show only errors during the import.
    """
    # Tokenizers that have used threads warn in every process started later, such as vLLM's. Here they read
    # one text at a time, which uses one thread anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _errors_only("torchao", "torch.utils._pytree"):
        import transformers.modeling_utils  # noqa: F401 - for what the import does
    if logging.getLogger().handlers:
        for name in _WITH_HANDLERS:
            library = logging.getLogger(name)
            library.handlers.clear()
            library.propagate = True


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Let the named loggers show only errors within the context."""
    import torch  # noqa: F401 - sets its loggers' levels when it is imported

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
