"""Independent pieces of work side by side on the cores of a CPU, each on one core.

torch shares every single operation out among all cores, which wait for each other at its end. Operations on
small matrices are over so soon that waiting is most of it, all the more where something else runs on the
machine. There it is faster to give each core a piece of its own. Each piece is computed on one core however
many work beside it, so that results are the same to the bit on every number of cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Longest side of a matrix; above, one operation is work enough for many cores, and several at a time would
# take several times the memory.
_LONGEST_SIDE = 1024
_THREADS_AT_START = torch.get_num_threads()


def is_small(sides: Iterable[int], device: torch.device) -> bool:
    """Whether work on matrices of these sides is faster side by side: on a CPU, where all are short."""
    return device.type == "cpu" and max(sides, default=0) <= _LONGEST_SIDE


def num_at_once() -> int:
    """Return how many pieces are worked on at once: one on every CPU, unless fewer threads were asked for.

    By itself torch has one thread for every core. On most rented machines a core is two CPUs, and a machine
    of two CPUs would work on one piece at a time.
    """
    threads = torch.get_num_threads()
    was_asked_for = threads != _THREADS_AT_START or "OMP_NUM_THREADS" in os.environ
    return threads if was_asked_for else max(threads, len(os.sched_getaffinity(0)))


def map_side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], *, small: bool
) -> Iterator[Result]:
    """Yield `function` of every item, in the order of the items.

    Items are taken as the results are: only one more result than `num_at_once` exists at a time.

    Args:
        function: Must not change anything that another item's work reads or changes.
        items: What to work on; read in the calling thread.
        small: Whether to work on several at a time (`is_small`); otherwise one follows the other in the
            calling thread, and torch shares out each operation.
    """
    threads, at_once = torch.get_num_threads(), num_at_once()
    if not small or at_once == 1:
        yield from map(function, items)
        return
    is_recording = torch.is_grad_enabled()  # which every thread has its own answer to

    def work(item: Item) -> Result:
        with torch.set_grad_enabled(is_recording):
            return function(item)

    remaining = iter(items)
    pending: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(at_once, "side-by-side", lambda: torch.set_num_threads(1)) as pool:
            pending.extend(pool.submit(work, item) for item in islice(remaining, at_once + 1))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
                yield result
    finally:
        # What a thread sets for itself is also what threads made later start with.
        torch.set_num_threads(threads)
