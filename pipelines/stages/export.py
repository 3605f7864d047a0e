"""Write the directory that vLLM and transformers load; its name appears when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.exporters.vllm.directory.writer import Export, find_unreadable, write_export
from ercsvd_deploy.format.files.manifest import REPORT_SUMS_FILE
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS, StockFormat
from ercsvd_deploy.models.experts.routed import EXPERTS
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import quantize_plan_of
from ercsvd_deploy.pipelines.stages.sizes import expert_bytes, planned_bytes
from ercsvd_deploy.recipe.fields import PlanError, summarize_problems

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload

REPORT_FILE = "ercsvd_report.json"
PAGE_FILE = "ercsvd_report.html"
CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
# These files are written again after the export is measured, so the manifest has no checksums of them.
REPORT_FILES = frozenset({REPORT_FILE, PAGE_FILE, CARD_FILE, REPORT_SUMS_FILE})


@dataclass(frozen=True)
class ExportStage(Stage):
    """The export directory and its format.

    Attributes:
        target: Absolute path of the directory to write.
        max_shard_bytes: Largest size of a shard, in bytes.
        format: Its name in the recipe.
    """

    target: Path
    max_shard_bytes: int
    format: str

    name = "export"
    memory_remedy = "lower export.max_shard_size"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names no directory.

        Raises:
            PlanError: the format cannot hold what the recipe asks for.
        """
        export = context.recipe.export
        stock = STOCK_FORMATS.get(export.format)
        if stock is not None:
            _check_readable(context, stock)
        if export.path is None:
            return None
        return cls(export.path.absolute(), export.max_shard_bytes, export.format)

    def settings(self) -> Any:
        """Return the settings that change the files; their directory does not."""
        return {"max_shard_bytes": self.max_shard_bytes, "format": self.format}

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's fingerprint, with digests of the sidecar files that are copied."""
        return super().fingerprint(before, data) | {"carried_over": data["carried_over"]}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the memory of the largest shard, read and written at once, and the export's disk space."""
        bare = work.architecture.without_experts
        total = max(
            sum(planned_bytes(bare, candidate.modules, work.stored).values()) for candidate in candidates
        )
        total += expert_bytes(work.architecture, candidates[0].experts, work.stored)
        shard = min(total, max(work.recipe.export.max_shard_bytes, work.largest_tensor))
        return Needs(beside_bytes=2 * shard, scratch_bytes=total, kept_bytes=total)

    def run(self, run: StageRun) -> Export:
        """Write all tensors, and the sidecar files of the original model."""
        recipe = run.recipe
        return write_export(
            self.target,
            work=run.directory,
            source=run.model.opened.directory,
            dtype=None if recipe.model.dtype == "auto" else recipe.model.dtype,
            store=run.model.store,
            architecture=run.model.original.architecture,
            compressed=CheckpointConfig(modules=run.model.modules),
            max_shard_bytes=self.max_shard_bytes,
            stock=STOCK_FORMATS.get(self.format),
            add_files=partial(carry_over_card, run.model.opened.directory),
            write_report=run.write_report,
            unlisted=REPORT_FILES,
            is_forced=run.is_forced,
        )


def carry_over_card(source: Path, directory: Path) -> None:
    """Copy the original model's card, which names its licence, beside ours."""
    card = source / CARD_FILE
    if card.is_file():
        shutil.copyfile(card, directory / ORIGINAL_CARD_FILE)


def _check_readable(context: PlanningContext, stock: StockFormat) -> None:
    """Refuse storage that vLLM and transformers cannot read without this package.

    Raises:
        PlanError: names the Linears and the reason.
    """
    architecture = context.architecture
    if architecture.reads_images:
        raise PlanError(
            f"export.format {stock.name} is for language models: vision-language models have other "
            "names in checkpoints than in memory; set vllm"
        )
    quantize_plan = quantize_plan_of(context.recipe, architecture)
    if quantize_plan.describe_experts(architecture):
        raise PlanError(
            f"export.format {stock.name}: routed experts of integers are read with this package alone, "
            f"since transformers keeps a layer's in one tensor: ignore '{EXPERTS}.*' in quantize, or set vllm"
        )
    modules = quantize_plan.describe({}, architecture)
    if "factorize" in context.planned:  # a target chooses the bits
        [candidate] = context.planned["factorize"].store([Candidate()])
        modules = {**modules, **candidate.presumed}
    modules = {name: storage for name, storage in modules.items() if storage.is_altered}
    problems = find_unreadable(modules, stock, architecture)
    if problems:
        raise PlanError(
            f"export.format {stock.name} cannot hold this model; change quantize, or set vllm:"
            + summarize_problems(problems)
        )
