"""The contract of a stage: one operation on a model, with everything about it in one place.

A stage is planned from the recipe and the model's shapes before a weight is read. It then declares how it
changes the model's storage, what its result depends on, how much memory and disk it needs, how it runs, and
which tables it adds to the report. The flow uses only this contract: a new stage is a class in its own file
and a line in `stages/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from pydantic import Field

from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.inputs.run_data import RunData
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload


@dataclass(frozen=True)
class PlanningContext:
    """The inputs from which stages are planned.

    Attributes:
        recipe: The recipe.
        config: The model's transformers config.
        architecture: The model's Linears.
        dtype: Name of the dtype of unquantized tensors, such as "bfloat16".
        planned: Name -> stage, for the stages before this one.
    """

    recipe: Recipe
    config: Any
    architecture: Architecture
    dtype: str
    planned: Mapping[str, Stage]

    @property
    def element(self) -> int:
        """Bytes of an unquantized value."""
        size: int = getattr(torch, self.dtype).itemsize
        return size

    def check_predictions(self, fields: Sequence[str], remedy: str) -> None:
        """Refuse fields of the recipe that need predictions of tokens, if the model makes none.

        Args:
            fields: Names of such fields that are set.
            remedy: What can be used instead.

        Raises:
            PlanError: there are some, and the model embeds or scores texts.
        """
        if fields and not self.architecture.predicts_tokens:
            verb = "embeds" if self.architecture.task == "embed" else "scores"
            raise PlanError(
                f"{' and '.join(fields)}: {self.recipe.model.path} {verb} texts and predicts no tokens: "
                f"remove it; {remedy}"
            )


@dataclass(frozen=True)
class Candidate:
    """One possible storage of the final model; where there are several, a search in the run decides.

    Attributes:
        modules: Name -> storage of every changed Linear except those of routed experts.
        experts: Name -> storage of the routed experts' Linears; the same in all candidates.
        num_compressed_layers: Number of factorized decoder layers, counted from the last.
        layer_ratio: Fraction of the parameters removed in each of these layers.
        presumed: Name -> final storage of all that a target chooses, as even as its budget allows; empty
            without a target.
    """

    modules: Mapping[str, Storage] = field(default_factory=dict)
    experts: Mapping[str, Storage] = field(default_factory=dict)
    num_compressed_layers: int = 0
    layer_ratio: float = 0.0
    presumed: Mapping[str, Storage] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """Coarse resource needs of a stage, in addition to files that earlier stages keep on disk.

    Attributes:
        working_bytes: Peak bytes of tensors on the device that layers run on.
        beside_bytes: Bytes of tensors on the host if layers run on a GPU: those read from or written to disk.
        scratch_bytes: Peak bytes in the work directory.
        kept_bytes: Part of them that stays until the run ends, or until the stage that reads it has finished.
        flops: Lower bound of the floating-point operations; a multiplication and an addition count as two.
    """

    working_bytes: int = 0
    beside_bytes: int = 0
    scratch_bytes: int = 0
    kept_bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table that a stage shows; terminal, page and model card render the same rows."""

    title: Annotated[str, Field(description="Its title.")]
    columns: Annotated[tuple[str, ...], Field(description="Headings of the columns.")]
    rows: Annotated[tuple[tuple[str, ...], ...], Field(description="Cells of every row.")]
    numbers: Annotated[tuple[str, ...], Field(description="Columns that are aligned to the right.")] = ()
    bold_rows: Annotated[tuple[int, ...], Field(description="Rows that stand out, from 0.")] = ()
    is_detail: Annotated[
        bool, Field(description="Whether it is long, so that only the page shows it, folded away.")
    ] = False


def label_columns(names: Iterable[str]) -> dict[str, str]:
    """Return local name of a Linear -> label of its column: the last part of the name if that is unique.

    Args:
        names: Local names of the Linears of all layers, which may differ between layers.
    """
    distinct = list(dict.fromkeys(names))
    ends = [name.rpartition(".")[2] for name in distinct]
    return {
        name: end if ends.count(end) == 1 else ".".join(name.split(".")[-2:])
        for name, end in zip(distinct, ends, strict=True)
    }


class Stage(ABC):
    """One operation on a model.

    Attributes:
        name: Its key in the report, its folder in the work directory, its name in messages and `--set`.
        is_kept: Whether the files of a temporary result stay until the run ends, for a later run with other
            settings.
        reported_as: The dataclass of the stage's part of the report; its fields have descriptions, and its
            JSON schema is published. None if the report has no such part.
        memory_remedy: The recipe settings that lower the stage's memory, for error messages.
    """

    name: ClassVar[str]
    memory_remedy: ClassVar[str] = "lower calibration.num_samples or calibration.sequence_length"
    is_kept: ClassVar[bool] = False
    reported_as: ClassVar[type | None] = None

    @classmethod
    @abstractmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage, or None if the recipe does not ask for it.

        Raises:
            PlanError: the recipe cannot work on this model; the message says what to change.
        """

    @property
    def temporary_for(self) -> str | None:
        """Name of the last stage that reads this one's result, if no later use needs it; else None.

        If that stage's result is cached, this stage is skipped. When that stage has finished, this one's
        files are removed.
        """
        return None

    @property
    def title(self) -> str:
        """The stage's title in progress messages."""
        return self.name.replace("_", " ")

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates after this stage, given those before it."""
        return candidates

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything the result depends on, as JSON values.

        Args:
            before: Fingerprint of the model before this stage, with model files, code and libraries.
            data: Purpose -> digests of texts, questions and calibration samples.
        """
        del data
        return dict(before) | {self.name: self.settings()}

    @abstractmethod
    def settings(self) -> Any:
        """Return the part of the recipe that this stage reads, as JSON values."""

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the stage's resource needs; `candidates` are those after it."""
        del work, candidates
        return Needs()

    def check_here(self) -> None:  # noqa: B027 - most stages have nothing to check
        """Refuse a run that lacks something on this machine, before any data is read.

        Raises:
            ValueError, RuntimeError: something is missing; the message says how to get it.
        """

    def check_data(self, data: RunData) -> Iterable[str]:
        """Return warnings about calibration data that may make the result worse.

        Raises:
            PlanError: the stage cannot work with this data.
        """
        del data
        return ()

    @abstractmethod
    def run(self, run: StageRun) -> Any:
        """Compute the result, reusing the stage's cache entries, and overlay changed tensors on `run.model`.

        Numerical modules are imported here, not at the top of the file, so that planning does not load them.

        Returns:
            The result: a dataclass, with `files` and `modules` if the stage changes the model.
        """

    def reported(self, result: Any) -> Any:
        """Return the reported part of a result, of class `reported_as`; by default the result itself."""
        return result

    def tables(self, result: Any) -> Iterable[Table]:
        """Return the tables that show a result."""
        del result
        return ()

    def warnings(self, result: Any) -> Iterable[str]:
        """Return warnings about a result."""
        del result
        return ()

    def files(self, result: Any) -> Sequence[Path]:
        """Return the tensor files of a result."""
        return list(getattr(result, "files", ()))
