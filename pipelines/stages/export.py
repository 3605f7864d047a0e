"""Write the directory that vLLM and transformers load; its name appears when it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ercsvd_deploy.exporters.vllm.writer import Export, write_export
from ercsvd_deploy.format.compressed_tensors import find_unreadable
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.pipelines.stages.contract import PlanError, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.quantize.storage import quantize_plan_of
from ercsvd_deploy.pipelines.stages.work import StageRun

# Written again when the finished export has been measured, so the manifest has no checksums of them.
REPORT_FILES = frozenset({"ercsvd_report.json", "ercsvd_report.html", "README.md"})


@dataclass(frozen=True)
class ExportStage(Stage):
    """Where the model goes.

    Attributes:
        target: The directory to appear, absolute.
        needs_plugin: Whether it is in our own format, which vLLM reads by the plugin.
    """

    target: Path
    needs_plugin: bool

    name = "export"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names no directory.

        Raises:
            PlanError: the format cannot hold what the recipe asks for.
        """
        export = context.recipe.export
        needs_plugin = export.format == "vllm"
        if not needs_plugin:
            _check_readable(context)
        return None if export.path is None else cls(export.path.absolute(), needs_plugin)

    def settings(self) -> Any:
        """Return the directory and its format."""
        return {"path": str(self.target), "needs_plugin": self.needs_plugin}

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
            max_shard_bytes=recipe.export.max_shard_bytes,
            needs_plugin=self.needs_plugin,
            add_files=run.write_report,
            unlisted=REPORT_FILES,
        )


def _check_readable(context: PlanningContext) -> None:
    """Refuse what vLLM and transformers would not read without this package.

    Raises:
        PlanError: names the Linears and the reason.
    """
    architecture = context.architecture
    if architecture.vision_layers:
        raise PlanError(
            "export.format compressed-tensors is for language models: vision-language models have other "
            "names in checkpoints than in memory; set vllm"
        )
    modules = quantize_plan_of(context.recipe, architecture).describe({}, architecture)
    fused = [[linear.name for linear in group] for layer in architecture.layers for group in layer.groups]
    problems = find_unreadable(modules, fused)
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise PlanError(
            "export.format compressed-tensors cannot hold this model; change quantize, or set vllm:\n  "
            + "\n  ".join(problems[:8])
            + more
        )
