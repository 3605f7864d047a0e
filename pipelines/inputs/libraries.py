"""The first import of transformers' model classes, which other libraries comment on."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_WITH_HANDLERS = ("huggingface_hub", "torch", "transformers")  # write to standard error by themselves


@functools.cache
def import_transformers() -> None:
    """Import what transformers builds models with.

    Where the program has set up logging, the libraries' messages go there, and not to handlers of their own.

    On the way it imports torchao where that is installed. torchao warns that it cannot load its kernels for
    other GPUs than this machine's, and torch that torchao registers its Enums in an old way. Nothing here
    runs torchao's kernels, so these two are not told while it is imported; errors are.
    """
    # Tokenizers that have used threads warn in every process started after that, vLLM's say; here they work
    # on one text at a time, which takes one thread anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _errors_alone("torchao", "torch.utils._pytree"):
        import transformers.modeling_utils  # noqa: F401 - for what the import does
    if logging.getLogger().handlers:
        for name in _WITH_HANDLERS:
            library = logging.getLogger(name)
            library.handlers.clear()
            library.propagate = True


@contextmanager
def _errors_alone(*names: str) -> Iterator[None]:
    """Let loggers tell of errors alone while this lasts."""
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
