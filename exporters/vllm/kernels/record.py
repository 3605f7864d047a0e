"""Record which integer matrices of a model have a working kernel, and the extra memory of the others.

vLLM chooses a kernel for a matrix, but does not check whether the kernel's operators exist: its CPU builds
have the same Python code and different operators. Therefore the first matrix of every kind is tried after
loading; if its kernel fails or gives wrong numbers, all matrices of this kind are served as plain ones. One
record belongs to one served model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable

REQUIRE_KERNELS = "ERCSVD_REQUIRE_KERNELS"  # environment variable


class KernelError(ValueError):
    """An integer matrix has no working kernel, and one is required."""


class KernelRecord:
    """The record of a served model's integer matrices.

    Args:
        is_required: Whether a matrix without a kernel is an error; it also is if the environment variable
            `ERCSVD_REQUIRE_KERNELS` is set.

    Raises:
        ValueError: the environment variable is neither 0 nor 1, nor a word such as true or off.
    """

    def __init__(self, is_required: bool = False) -> None:
        self._is_required = _requires_kernels(os.environ.get(REQUIRE_KERNELS, "")) or is_required
        self._trials: dict[Hashable, str | None] = {}  # kind of matrix -> why its kernel failed
        self._reasons: Counter[str] = Counter()
        self._num_served = 0
        self._dtype = ""
        self._extra_bytes = 0

    def was_tried(self, kind: Hashable) -> bool:
        """Return whether a matrix of this kind has been tried."""
        return kind in self._trials

    def failure(self, kind: Hashable) -> str | None:
        """Return why the kernel of this kind failed; None if it works or was not tried."""
        return self._trials.get(kind)

    def record_trial(self, kind: Hashable, failure: str | None) -> None:
        """Record the result of a kind's trial: why its kernel failed, or None."""
        self._trials[kind] = failure

    def served_by_kernel(self) -> None:
        """Count a matrix that is served by its kernel."""
        self._num_served += 1

    def require(self, reason: str) -> None:
        """Refuse a matrix without a kernel if kernels are required.

        Raises:
            KernelError: kernels are required.
        """
        if self._is_required:
            raise KernelError(
                f"{reason}\n({REQUIRE_KERNELS}, or require_kernels in config.json, forbids plain ones)"
            )

    def served_plain(self, reason: str, dtype: str, extra_bytes: int) -> None:
        """Count a matrix that is served as a plain one and takes `extra_bytes` more on this rank."""
        self._dtype = dtype
        self._reasons[reason.splitlines()[0].rstrip(":")] += 1
        self._extra_bytes += extra_bytes

    def summary(self) -> str | None:
        """Return one line about the integer matrices served as plain ones; None if there are none."""
        num_plain = sum(self._reasons.values())
        if not num_plain:
            return None
        reasons = "; ".join(f"{reason} ({count} matrices)" for reason, count in self._reasons.most_common())
        return (
            f"ercsvd: {num_plain} of {num_plain + self._num_served} integer matrices are served as plain "
            f"{self._dtype} ones, which take {self._extra_bytes / 2**20:,.1f} MiB more memory on each rank: "
            f"{reasons}. The numbers are the same; {REQUIRE_KERNELS}=1 makes this an error."
        )


def _requires_kernels(value: str) -> bool:
    """Return whether a value of the environment variable means yes.

    Raises:
        ValueError: the value is neither a word for yes nor one for no.
    """
    word = value.strip().lower()
    if word in ("", "0", "false", "no", "off"):
        return False
    if word in ("1", "true", "yes", "on"):
        return True
    raise ValueError(
        f"{REQUIRE_KERNELS} is {value!r}; set it to 1 to require kernels, to 0 or not at all if not"
    )
