"""What a stage is: one thing that is done to a model, with all that is known of it in one place.

A stage is planned from the recipe and the model's shapes before a weight is read. From then on it knows how
it changes the way the model is stored, what its result depends on, what memory and disk it takes, how it
runs, and which tables it adds to the report. The flow knows stages by this contract alone: a new one is a
class in a file of its own, and a line in `stages/__init__.py`.
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
from ercsvd_deploy.models.architecture import Architecture
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.inputs.run_data import RunData
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload


class PlanError(ValueError):
    """The recipe cannot work on this model."""


@dataclass(frozen=True)
class PlanningContext:
    """What stages are planned from.

    Attributes:
        recipe: The recipe.
        config: The model's config, as transformers has it.
        architecture: The model's Linears.
        dtype: Precision of the tensors that are not integers, "bfloat16" say.
        planned: The stages before, by name.
    """

    recipe: Recipe
    config: Any
    architecture: Architecture
    dtype: str
    planned: Mapping[str, Stage]

    @property
    def element(self) -> int:
        """Bytes of a value that is not quantized."""
        size: int = getattr(torch, self.dtype).itemsize
        return size

    def check_predictions(self, fields: Sequence[str], remedy: str) -> None:
        """Refuse fields of the recipe that need predictions of tokens, if the model makes none.

        Args:
            fields: Those that are set.
            remedy: What can be used instead.

        Raises:
            PlanError: there are some, and the model embeds or scores texts.
        """
        if fields and not self.architecture.predicts_tokens:
            made = "embeds" if self.architecture.task == "embed" else "scores"
            raise PlanError(
                f"{' and '.join(fields)}: {self.recipe.model.path} {made} texts and predicts no tokens: "
                f"remove it; {remedy}"
            )


@dataclass(frozen=True)
class Candidate:
    """One way the model may be stored in the end; a search decides between several when the recipe runs.

    Attributes:
        modules: Description of every altered Linear, those of routed experts left out.
        experts: The same of routed experts: thousands, which all candidates have in common.
        num_compressed_layers: How many of the last decoder layers are factorized.
        layer_ratio: Share of the parameters removed in each of them.
    """

    modules: Mapping[str, Storage] = field(default_factory=dict)
    experts: Mapping[str, Storage] = field(default_factory=dict)
    num_compressed_layers: int = 0
    layer_ratio: float = 0.0


@dataclass(frozen=True)
class Needs:
    """Coarse counts of what a stage takes, beside what stages before it have left on disk.

    Attributes:
        working_bytes: Of tensors where layers run, at their highest.
        beside_bytes: Of tensors on the host if layers run on a GPU: those on their way to and from disk.
        scratch_bytes: Of the work directory, at its highest.
        kept_bytes: What of that stays until the run ends, or until the stage that it is for has finished.
        flops: Floating-point operations, at least; a multiplication and an addition are two.
    """

    working_bytes: int = 0
    beside_bytes: int = 0
    scratch_bytes: int = 0
    kept_bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Table:
    """Rows that a stage shows, computed once: terminal, page and model card have the same."""

    title: Annotated[str, Field(description="What it shows.")]
    columns: Annotated[tuple[str, ...], Field(description="Heads of the columns.")]
    rows: Annotated[tuple[tuple[str, ...], ...], Field(description="Cells of every row.")]
    numbers: Annotated[tuple[str, ...], Field(description="Columns that are aligned to the right.")] = ()
    bold_rows: Annotated[tuple[int, ...], Field(description="Rows that stand out, from 0.")] = ()
    is_detail: Annotated[
        bool, Field(description="Whether it is long, so that the page alone shows it, folded away.")
    ] = False


def label_columns(names: Iterable[str]) -> dict[str, str]:
    """Return Linear's name within a layer -> what its column is called, the last part if that tells it apart.

    Args:
        names: Of the Linears of all layers: some have a dense MLP, others shared experts.
    """
    distinct = list(dict.fromkeys(names))
    ends = [name.rpartition(".")[2] for name in distinct]
    return {
        name: end if ends.count(end) == 1 else ".".join(name.split(".")[-2:])
        for name, end in zip(distinct, ends, strict=True)
    }


class Stage(ABC):
    """One thing that is done to a model.

    Attributes:
        name: Its key in the report, its folder in the work directory, its name in messages and `--set`.
        is_kept: Whether files of a temporary result stay instead until the run ends, for a second try with
            other settings.
        reported_as: The dataclass that the report has of a result, under the stage's name; its fields are
            described, and its JSON schema is published. None: nothing.
        memory_remedy: What of the recipe makes it take less memory, for whoever has too little.
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
            PlanError: the recipe cannot work on this model; the message says what would.
        """

    @property
    def temporary_for(self) -> str | None:
        """Name of the last stage that reads this one's result, if it is kept for such ones alone.

        If that is finished, this one is not run, and when it has finished, this one's files go.
        """
        return None

    @property
    def title(self) -> str:
        """What progress is shown under."""
        return self.name.replace("_", " ")

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return how the model may be stored behind this stage, given how it may be before it."""
        return candidates

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything the result depends on, as JSON values.

        Args:
            before: The same of the stages before that change the model; model, code and libraries are in it.
            data: Digests of texts, questions and calibration samples, by what they are for.
        """
        del data
        return dict(before) | {self.name: self.settings()}

    @abstractmethod
    def settings(self) -> Any:
        """Return what of the recipe this stage reads, as JSON values."""

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return what the stage takes; `candidates` is how the model may be stored behind it."""
        del work, candidates
        return Needs()

    def check_here(self) -> None:  # noqa: B027 - few stages have something to refuse
        """Refuse a run that lacks something on this machine, before any data is read.

        Raises:
            ValueError, RuntimeError: what it lacks, and how to get it.
        """

    def check_data(self, data: RunData) -> Iterable[str]:
        """Return what about the calibration data may make the result worse than hoped.

        Raises:
            PlanError: the stage cannot work with this data.
        """
        del data
        return ()

    @abstractmethod
    def run(self, run: StageRun) -> Any:
        """Do the work, as far as the stage's folder has it not, and put the result into `run.model`.

        What computes is imported here, not above: planning loads none of it.

        Returns:
            The result: a dataclass; with `files` and `modules` if the model is changed.
        """

    def reported(self, result: Any) -> Any:
        """Return what the report has of a result, a `reported_as`; the result itself if it is one."""
        return result

    def tables(self, result: Any) -> Iterable[Table]:
        """Return what people are shown of a result."""
        del result
        return ()

    def warnings(self, result: Any) -> Iterable[str]:
        """Return what of a result went less well than hoped."""
        del result
        return ()

    def files(self, result: Any) -> Sequence[Path]:
        """Return the files of tensors that a result consists of."""
        return list(getattr(result, "files", ()))
