"""Judge the compressed model beside the original, on held-out texts and questions about pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter

from ercsvd_deploy.evaluation.comparison import Comparison, compare_models
from ercsvd_deploy.pipelines.stages.contract import PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.work import StageRun
from ercsvd_deploy.pipelines.state.cache import OUTCOME

_COMPARISON = TypeAdapter(Comparison)


@dataclass(frozen=True)
class JudgeStage(Stage):
    """What both models are worth, and how far their outputs are apart."""

    name = "judge"
    memory_remedy = "lower evaluation.max_sequences or evaluation.sequence_length"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names nothing to judge on."""
        recipe = context.recipe
        return cls() if recipe.judged_texts or recipe.evaluation.visual_questions else None

    def settings(self) -> Any:
        """Return nothing: what is judged on is among the data."""
        return None

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model depends on, and digests of what it is judged on."""
        return {**before, "texts": data["texts"], "questions": data["questions"]}

    def run(self, run: StageRun) -> Comparison:
        """Stream both models through everything at once."""
        stored = run.cache.findings(OUTCOME)
        if stored is None:
            original = run.model.original
            with run.progress(self.title, original.num_layers) as on_layer:
                comparison = compare_models(
                    original, run.model.stream(), run.data.texts, run.data.questions, on_layer
                )
            stored = _COMPARISON.dump_python(comparison)
            run.cache.finish(OUTCOME, stored)
        return _COMPARISON.validate_python(stored)
