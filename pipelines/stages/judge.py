"""Judge the original, then the compressed model beside it, on held-out texts and questions about pictures.

Two stages, so that runs which compress one model differently judge it once: the original's result depends on
the model and on what it is judged on, and on nothing else of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import TypeAdapter

from ercsvd_deploy.evaluation.comparison import (
    MOST_POSITIONS,
    Comparison,
    Outputs,
    judge_compressed,
    judge_original,
)
from ercsvd_deploy.evaluation.quality import Quality
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload
from ercsvd_deploy.pipelines.state.cache import OUTCOME, FinishedWork

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun

_COMPARISON = TypeAdapter(Comparison)
_QUALITY = TypeAdapter(Quality)
# What stages are calibrated on and how, which is in every fingerprint, is no business of the original.
_GATES_OF_PREDICTIONS = ("perplexity_increase", "logprob_kl")
_CALIBRATION = frozenset({"calibration_samples", "token_weight"})


@dataclass(frozen=True)
class JudgeOriginalStage(Stage):
    """What the original is worth, and its layers' outputs, which the compressed model is compared with.

    It stands before all stages that change the model, and its files stay until the run ends: a second try
    with other settings finds them.
    """

    name = "judge_original"
    memory_remedy = "lower evaluation.max_sequences or evaluation.sequence_length"
    is_kept = True

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names nothing to judge on.

        Raises:
            PlanError: predictions are to be judged of a model that makes none.
        """
        gates = context.recipe.gates
        asked = ["evaluation.perplexity"] if context.recipe.evaluation.perplexity else []
        asked += [
            f"gates.{name}" for name in _GATES_OF_PREDICTIONS if gates and getattr(gates, name) is not None
        ]
        context.check_predictions(asked, "gates.final_layer_error compares the outputs of the last layer")
        return cls() if _is_judging(context) else None

    @property
    def temporary_for(self) -> str:
        """The comparison."""
        return "judge"

    def settings(self) -> Any:
        """Return nothing: what is judged on is among the data."""
        return None

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model, and digests of what it is judged on."""
        model = {name: value for name, value in before.items() if name not in _CALIBRATION}
        return {**model, "texts": data["texts"], "questions": data["questions"]}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return a pass of the original and its logits, and what the kept outputs take on disk."""
        del candidates
        logits = max(work.logits(each, parts=2) for each in work.judged)
        passing = work.layer_weights + max(map(work.passing, work.judged))
        layers = work.architecture.num_layers - 1
        tokens = [each.tokens for each in work.judged if not each.pictures]
        kept = sum(count + layers * min(count, MOST_POSITIONS) for count in tokens)
        num_bytes = kept * work.hidden * work.computed
        return Needs(
            working_bytes=sum(map(work.activations, work.judged))
            + max(passing, work.layer_load, work.outside_weights + logits, work.embedding(work.judged)),
            beside_bytes=2 * work.layer_weights,
            scratch_bytes=num_bytes,
            kept_bytes=num_bytes,
            flops=sum(work.forward_flops(each) + work.head_flops(each) for each in work.judged),
        )

    def run(self, run: StageRun) -> Quality:
        """Stream the original through everything."""
        original, cache = run.model.original, run.cache
        stored = cache.findings(OUTCOME)
        pieces = map(_outputs_piece, range(original.num_layers))
        if stored is None or any(cache.findings(piece) is None for piece in pieces):

            def keep(index: int, outputs: Outputs) -> None:
                piece = _outputs_piece(index)
                if cache.findings(piece) is None:
                    tensors = {str(place): tensor.cpu() for place, tensor in enumerate(outputs.values())}
                    cache.finish(piece, {}, tensors or None)

            with run.progress(self.title, original.num_layers) as on_layer:
                quality = judge_original(original, run.data.texts, run.data.questions, keep, on_layer)
            stored = _QUALITY.dump_python(quality)
            cache.finish(OUTCOME, stored)
        return _QUALITY.validate_python(stored)


@dataclass(frozen=True)
class JudgeStage(Stage):
    """What the compressed model is worth, and how far its outputs are from the original's."""

    name = "judge"
    memory_remedy = "lower evaluation.max_sequences or evaluation.sequence_length"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe names nothing to judge on."""
        return cls() if _is_judging(context) else None

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
        logits = max(
            2 * work.logits(each, parts=2) + 5 * FLOAT32 * each.length * work.num_logits
            for each in work.judged
        )
        return Needs(
            working_bytes=states
            + max(passing, work.layer_load, 2 * work.outside_weights + logits, work.embedding(work.judged)),
            beside_bytes=2 * work.layer_weights,
            # Logits of both models on texts, of one on questions. How little the compressed layers compute,
            # the run decides.
            flops=sum((1 if each.pictures else 2) * work.head_flops(each) for each in work.judged),
        )

    def run(self, run: StageRun) -> Comparison:
        """Stream the compressed model through everything."""
        stored = run.cache.findings(OUTCOME)
        if stored is None:
            compressed = run.model.stream()
            kept = _KeptOutputs(run.cache_of(JudgeOriginalStage.name), tuple(run.data.texts))
            with run.progress(self.title, compressed.num_layers) as on_layer:
                comparison = judge_compressed(
                    compressed,
                    run.model.original,
                    run.results[JudgeOriginalStage.name],
                    kept.of_layer,
                    run.data.texts,
                    run.data.questions,
                    on_layer,
                )
            stored = _COMPARISON.dump_python(comparison)
            run.cache.finish(OUTCOME, stored)
        return _COMPARISON.validate_python(stored)


@dataclass(frozen=True)
class _KeptOutputs:
    """The original's outputs on disk; the inverse of what `JudgeOriginalStage` keeps."""

    cache: FinishedWork
    texts: tuple[str, ...]

    def of_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return text -> outputs [positions, hidden] of a layer."""
        if not self.texts:
            return {}
        file: Path = self.cache.tensors_file(_outputs_piece(index))
        places = [str(place) for place in range(len(self.texts))]
        tensors = FileStore([file]).read(places)
        return {text: tensors[place] for text, place in zip(self.texts, places, strict=True)}


def _outputs_piece(layer: int) -> str:
    return f"outputs-{layer:05d}"


def _is_judging(context: PlanningContext) -> bool:
    recipe = context.recipe
    return bool(recipe.judged_texts or recipe.evaluation.visual_questions)
