"""Independent pieces of work side by side on the cores of a CPU, each on one core.

torch divides every single operation between all cores, which wait for each other at its end. For small
matrices waiting takes most of the time, even more if something else runs on the machine: it is faster to give
each core one piece of work. A piece is always computed on one core, so that results are identical to the bit
on any number of cores.
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

# Longest side of a matrix. Above, one operation keeps many cores busy, and several at a time would take
# several times the memory.
_LONGEST_SIDE = 1024
_THREADS_AT_START = torch.get_num_threads()


def is_small(sides: Iterable[int], device: torch.device) -> bool:
    """Whether matrices of these sides are faster side by side: on a CPU, if all sides are short."""
    return device.type == "cpu" and max(sides, default=0) <= _LONGEST_SIDE


def num_at_once() -> int:
    """Return the number of pieces computed at once: one on every CPU, unless fewer threads were requested.

    By default torch has one thread for every core. On most cloud machines a core is two CPUs, so that a
    machine of two CPUs would compute one piece at a time.
    """
    threads = torch.get_num_threads()
    was_requested = threads != _THREADS_AT_START or "OMP_NUM_THREADS" in os.environ
    return threads if was_requested else max(threads, len(os.sched_getaffinity(0)))


def map_side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], *, small: bool
) -> Iterator[Result]:
    """Yield `function` of every item, in the order of the items.

    Items are read as results are consumed: at most one more result than `num_at_once` exists at a time.

    Args:
        function: Must not change anything that another item's work reads or changes.
        items: The inputs; read in the calling thread.
        small: Whether several are processed at a time (`is_small`); otherwise one follows the other in the
            calling thread, and torch divides each operation between the cores.
    """
    threads, at_once = torch.get_num_threads(), num_at_once()
    if not small or at_once == 1:
        yield from map(function, items)
        return
    is_recording = torch.is_grad_enabled()  # a setting of each thread

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
        # The setting of a thread is also the initial one of threads that are created later.
        torch.set_num_threads(threads)
