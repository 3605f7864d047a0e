"""Formats of dense integers that stock vLLM reads without this package. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from ercsvd_deploy.format import auto_round, compressed_tensors
from ercsvd_deploy.format.storage import Bits, Storage


class _WhyUnreadable(Protocol):
    def __call__(self, storage: Storage, *, is_embedding: bool, is_output_layer: bool) -> str | None: ...


@dataclass(frozen=True)
class StockFormat:
    """A format with what it can hold and how config.json describes it.

    Attributes:
        name: As recipes and `quant_method` have it.
        bits: Bits of integers that its loaders read.
        package: What transformers needs to load it.
        why_unreadable: Why its loaders cannot read a matrix, to be put behind its name; None if they can.
        bytes_beyond: Bytes that a matrix has in it beyond those of this project's own tensors.
        describe: `quantization_config`, given the storage of changed Linears and the names of the others.
    """

    name: str
    bits: tuple[int, ...]
    package: str
    why_unreadable: _WhyUnreadable
    bytes_beyond: Callable[[Storage], int]
    describe: Callable[[Mapping[str, Storage], Collection[str]], dict[str, Any]]

    def find_unreadable(
        self,
        modules: Mapping[str, Storage],
        stacks: Iterable[Sequence[str]],
        *,
        embedding: str | None = None,
        output_layer: str | None = None,
    ) -> list[str]:
        """Return one line for each matrix, or stack of them, that loaders of the format cannot read.

        Args:
            modules: Name of every changed matrix -> its storage.
            stacks: Names of Linears that vLLM multiplies as one.
            embedding: Name of the input embedding.
            output_layer: Name of the output layer.
        """
        problems = []
        for name, storage in modules.items():
            reason = self.why_unreadable(
                storage, is_embedding=name == embedding, is_output_layer=name == output_layer
            )
            if reason is not None:
                problems.append(f"{name} {reason}")
        for names in stacks:
            kinds = {modules[name].weight if name in modules else None for name in names}
            if len(kinds) > 1:
                problems.append(
                    f"{', '.join(names)} are stored in {len(kinds)} ways: vLLM stacks them into one layer, "
                    "which the format stores in one way"
                )
        return problems


COMPRESSED_TENSORS = StockFormat(
    "compressed-tensors",
    compressed_tensors.READABLE_BITS,
    "compressed-tensors",
    compressed_tensors.why_unreadable,
    lambda _storage: 0,
    compressed_tensors.describe,
)
AUTO_ROUND = StockFormat(
    "auto-round",
    get_args(Bits),
    "auto-round",
    auto_round.why_unreadable,
    auto_round.bytes_beyond,
    auto_round.describe,
)
STOCK_FORMATS = {each.name: each for each in (COMPRESSED_TENSORS, AUTO_ROUND)}
