"""Judge the compressed model beside the original, on held-out texts and questions about pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter

from ercsvd_deploy.evaluation.comparison import Comparison, compare_models
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.work import StageRun
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload
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

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the highest of both models' passes and of their logits."""
        del candidates  # layers are computed on whole matrices, however they are stored
        states = 2 * sum(map(work.activations, work.judged))
        # Outputs are compared in float64: the difference, widened and squared.
        comparing = max(each.batch_tokens for each in work.judged) * work.hidden * (FLOAT32 + 2 * FLOAT64)
        passing = work.layer_weights + max(comparing, *map(work.passing, work.judged))
        # Of both models, the old until the new are there, and log-probabilities of one window.
        vocabulary = work.architecture.vocab_size
        logits = max(
            2 * work.logits(each, parts=2) + 5 * FLOAT32 * each.length * vocabulary for each in work.judged
        )
        return Needs(
            working_bytes=states
            + max(passing, work.layer_load, 2 * work.outside_weights + logits, work.embedding(work.judged)),
            beside_bytes=2 * work.layer_weights,
            # Of the compressed model only the logits: how little its layers compute, the run decides.
            flops=sum(work.forward_flops(each) + 2 * work.head_flops(each) for each in work.judged),
        )

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
