"""Measurements on the finished export: lm-eval's tasks, and serving parity with a real vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ercsvd_deploy.pipelines.inputs.parity_prompts import make_prompts
from ercsvd_deploy.pipelines.judging.parity.measure import (
    ServingParity,
    check_vllm,
    log_path,
    measure_parity,
)
from ercsvd_deploy.pipelines.judging.tasks import (
    TaskMetrics,
    TaskResults,
    TaskSettings,
    check_tasks,
    run_tasks,
)
from ercsvd_deploy.pipelines.judging.tasks_in_vllm import run_tasks_in_vllm
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.sections import LmEval

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload

# Memory of a vLLM process beside its weights: libraries, workspace and a small KV cache.
_ENGINE_BYTES = 2 * 2**30


@dataclass
class MeasuredExport:
    """Measurements of the export; `problems` has a line for everything that could not be measured."""

    original_tasks: TaskMetrics = field(default_factory=dict)
    compressed_tasks: TaskMetrics = field(default_factory=dict)
    serving: ServingParity | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredExportStage(Stage):
    """The measurements to make on the export.

    The export is complete already, so a failed measurement does not fail the run: it gives a warning, and a
    gate that needs the measurement is missed.

    Attributes:
        lm_eval: The recipe's tasks.
        trust_remote_code: Whether the tasks run the model's own code.
        is_served: Whether vLLM serves the export, at every tensor-parallel size that this machine can run.
    """

    lm_eval: LmEval | None
    trust_remote_code: bool
    is_served: bool

    name = "measured_export"
    memory_remedy = "leave out gates.serving_parity, or lower evaluation.lm_eval.batch_size"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if there is no export, or nothing to measure on it.

        Raises:
            PlanError: tasks are to run in vLLM, and the model reads pictures; or predictions are to be
                measured of a model that makes none.
        """
        recipe = context.recipe
        is_served = recipe.gates is not None and recipe.gates.serving_parity is not None
        if recipe.export.path is None or (recipe.evaluation.lm_eval is None and not is_served):
            return None
        tasks = recipe.evaluation.lm_eval
        fields = ["evaluation.lm_eval"] if tasks is not None else []
        context.check_predictions(
            [*fields, *(["gates.serving_parity"] if is_served else [])],
            "its vectors or scores are those of vllm.LLM(DIRECTORY, runner='pooling')",
        )
        if tasks is not None and tasks.engine == "vllm" and context.architecture.reads_images:
            raise PlanError(
                "evaluation.lm_eval.engine: vllm is for text models: remove it, or set transformers"
            )
        return cls(tasks, recipe.model.trust_remote_code, is_served)

    @property
    def starts_vllm(self) -> bool:
        """Whether any measurement starts a vLLM process."""
        return self.is_served or (self.lm_eval is not None and self.lm_eval.engine == "vllm")

    def settings(self) -> Any:
        """Return the tasks, and whether vLLM serves the export."""
        return {
            "lm_eval": self.lm_eval and self.lm_eval.model_dump(mode="json"),
            "is_served": self.is_served,
        }

    def check_here(self) -> None:
        """Refuse tasks that cannot be loaded, and a parity gate where vLLM is not installed.

        Raises:
            EvaluationError: lm-eval is not installed, or cannot load a task.
            ServingError: vLLM is needed and not installed.
        """
        if self.lm_eval is not None:
            check_tasks(self._task_settings(self.lm_eval))
            if self.lm_eval.engine == "vllm":
                check_vllm("evaluation.lm_eval.engine: vllm")
        if self.is_served:
            check_vllm("gates.serving_parity")

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the bytes of the original's weights, which lm-eval loads whole.

        vLLM holds no more for the export, even if it has no kernel for integers. Operations depend on the
        tasks and are not counted.
        """
        del candidates
        weights = work.architecture.total_parameters * work.stored
        return Needs(working_bytes=weights + (_ENGINE_BYTES if self.starts_vllm else 0), beside_bytes=weights)

    def run(self, run: StageRun) -> MeasuredExport:
        """Run all measurements; those in vLLM run in separate processes."""
        measured = MeasuredExport()
        export: Path = run.results["export"].directory
        if self.lm_eval is not None:
            try:
                original_results, compressed_results = (
                    self._run_tasks(self.lm_eval, directory, export, run)
                    for directory in (run.model.opened.directory, export)
                )
                measured.original_tasks, measured.compressed_tasks = (
                    original_results.metrics,
                    compressed_results.metrics,
                )
                measured.problems += [f"{problem} (original)" for problem in original_results.problems]
                measured.problems += compressed_results.problems
            except (ValueError, OSError, RuntimeError, ImportError) as error:
                measured.problems.append(f"lm-eval did not finish: {error}")
        if self.is_served:
            run.model.original.forget_inputs()  # it is not run again, and vLLM needs an empty GPU
            # In float32 on a GPU too: the difference is then the rounding of one program, not of two.
            compressed = run.model.stream(torch.float32)
            prompts = make_prompts(run.data.texts, run.data.picture_prompts, compressed.config)
            try:
                measured.serving = measure_parity(export, compressed, prompts, run.recipe)
                measured.problems += measured.serving.warnings()
            except (ValueError, OSError, RuntimeError) as error:
                measured.problems.append(f"serving parity was not measured: {error}")
        return measured

    def _run_tasks(self, recipe: LmEval, directory: Path, export: Path, run: StageRun) -> TaskResults:
        """Return lm-eval's results on one model; if vLLM fails, its log is kept beside the export."""
        settings = self._task_settings(recipe)
        if recipe.engine == "transformers":
            return run_tasks(directory, settings, run.model.device)
        log = log_path(export)
        size = min(run.recipe.serving.tensor_parallel_sizes)
        results = run_tasks_in_vllm(directory, settings, size, log, eager=recipe.eager)
        log.unlink(missing_ok=True)
        return results

    def _task_settings(self, recipe: LmEval) -> TaskSettings:
        return TaskSettings(
            tasks=recipe.tasks,
            num_fewshot=recipe.num_fewshot,
            limit=recipe.limit,
            batch_size=recipe.batch_size,
            apply_chat_template=recipe.apply_chat_template,
            fewshot_as_multiturn=recipe.apply_chat_template and recipe.fewshot_as_multiturn,
            include_path=recipe.include_path,
            trust_remote_code=self.trust_remote_code,
        )

    def warnings(self, result: MeasuredExport) -> Iterable[str]:
        """Return a message about the measurements that failed."""
        return result.problems
