"""Write the directory that vLLM and transformers load; its name appears when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from ercsvd_deploy.exporters.vllm.writer import Export, write_export
from ercsvd_deploy.format.manifest import REPORT_SUMS_FILE
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.sizes import planned_bytes
from ercsvd_deploy.pipelines.stages.work import StageRun
from ercsvd_deploy.pipelines.stages.workload import Workload

REPORT_FILE = "ercsvd_report.json"
PAGE_FILE = "ercsvd_report.html"
CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
# Written again when the finished export has been measured, so the manifest has no checksums of them.
REPORT_FILES = frozenset({REPORT_FILE, PAGE_FILE, CARD_FILE, REPORT_SUMS_FILE})


@dataclass(frozen=True)
class ExportStage(Stage):
    """Where the model goes.

    Attributes:
        target: The directory to appear, absolute.
        max_shard_bytes: Upper size of a file of tensors.
    """

    target: Path
    max_shard_bytes: int

    name = "export"
    memory_remedy = "lower export.max_shard_size"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names no directory."""
        path = context.recipe.export.path
        return None if path is None else cls(path.absolute(), context.recipe.export.max_shard_bytes)

    def settings(self) -> Any:
        """Return what the files depend on: wherever they are, they are the same."""
        return {"max_shard_bytes": self.max_shard_bytes}

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model depends on, and digests of the files that come with it."""
        return super().fingerprint(before, data) | {"carried_over": data["carried_over"]}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the largest shard, beside the pages of the files that it comes from."""
        total = max(
            sum(planned_bytes(work.architecture, each.modules, work.stored).values()) for each in candidates
        )
        shard = min(total, max(work.recipe.export.max_shard_bytes, work.largest_tensor))
        return Needs(beside_bytes=2 * shard, scratch_bytes=total, kept_bytes=total)

    def run(self, run: StageRun) -> Export:
        """Write all tensors, and what came with the original model."""
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
            add_files=partial(carry_over_card, run.model.opened.directory),
            add_reports=run.write_report,
            unlisted=REPORT_FILES,
            is_forced=run.is_forced,
        )


def carry_over_card(source: Path, directory: Path) -> None:
    """Copy the original model's own card, which names its licence, beside ours."""
    card = source / CARD_FILE
    if card.is_file():
        shutil.copyfile(card, directory / ORIGINAL_CARD_FILE)
