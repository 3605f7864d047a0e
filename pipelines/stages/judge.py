"""Judge the original, then the compressed model beside it, on held-out texts and questions about pictures.

Two stages, so that runs that compress one model differently judge the original once: its result depends only
on the model, the texts and the questions.
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
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload
from ercsvd_deploy.pipelines.state.cache import OUTCOME, CacheFolder
from ercsvd_deploy.recipe.gates import GATES

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun

_COMPARISON = TypeAdapter(Comparison)
_QUALITY = TypeAdapter(Quality)
# Keys of a fingerprint about calibration; the original's result does not depend on them.
_CALIBRATION = frozenset({"calibration_samples", "token_weight"})


@dataclass(frozen=True)
class JudgeOriginalStage(Stage):
    """The original's quality, and its layers' outputs for the comparison with the compressed model.

    It comes before all stages that change the model. Its files stay until the run ends, so that a later run
    with other settings reuses them.
    """

    name = "judge_original"
    memory_remedy = "lower evaluation.max_sequences or evaluation.sequence_length"
    is_kept = True

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe has no texts or questions to judge on.

        Raises:
            PlanError: the recipe judges predictions, and the model makes none.
        """
        gates = context.recipe.gates
        fields = ["evaluation.perplexity"] if context.recipe.evaluation.perplexity else []
        fields += [
            f"gates.{name}"
            for name, kind in GATES.items()
            if kind.reads_predictions and gates and getattr(gates, name) is not None
        ]
        context.check_predictions(fields, "gates.final_layer_error compares the outputs of the last layer")
        return cls() if _is_judging(context) else None

    @property
    def temporary_for(self) -> str:
        """The stage that reads the original's outputs."""
        return "judge"

    def settings(self) -> Any:
        """Return None: texts and questions are part of the data's digests."""
        return None

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's fingerprint without calibration, with the digests of texts and questions."""
        model = {name: value for name, value in before.items() if name not in _CALIBRATION}
        return {**model, "texts": data["texts"], "questions": data["questions"]}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the memory of one pass of the original with its logits, and the disk for kept outputs."""
        del candidates
        logits = max(work.logits(sequences, parts=2) for sequences in work.judged)
        passing = work.layer_weights + max(map(work.passing, work.judged))
        layers = work.architecture.num_layers - 1
        tokens = [sequences.tokens for sequences in work.judged if not sequences.pictures]
        kept_positions = sum(count + layers * min(count, MOST_POSITIONS) for count in tokens)
        num_bytes = kept_positions * work.hidden * work.computed
        return Needs(
            working_bytes=sum(map(work.activations, work.judged))
            + max(passing, work.layer_load, work.outside_weights + logits, work.embedding(work.judged)),
            beside_bytes=2 * work.layer_weights,
            scratch_bytes=num_bytes,
            kept_bytes=num_bytes,
            flops=sum(
                work.forward_flops(sequences) + work.head_flops(sequences) for sequences in work.judged
            ),
        )

    def run(self, run: StageRun) -> Quality:
        """Stream the original over all texts and questions."""
        original, cache = run.model.original, run.cache
        quality_values = cache.entry(OUTCOME)
        pieces = map(_outputs_piece, range(original.num_layers))
        if quality_values is None or any(cache.entry(piece) is None for piece in pieces):

            def keep(index: int, outputs: Outputs) -> None:
                piece = _outputs_piece(index)
                if cache.entry(piece) is None:
                    tensors = {str(place): tensor.cpu() for place, tensor in enumerate(outputs.values())}
                    cache.write(piece, {}, tensors or None)

            with run.progress(self.title, original.num_layers) as on_layer:
                quality = judge_original(original, run.data.texts, run.data.questions, keep, on_layer)
            quality_values = _QUALITY.dump_python(quality)
            cache.write(OUTCOME, quality_values)
        return _QUALITY.validate_python(quality_values)


@dataclass(frozen=True)
class JudgeStage(Stage):
    """The compressed model's quality, and the distance of its outputs from the original's."""

    name = "judge"
    memory_remedy = "lower evaluation.max_sequences or evaluation.sequence_length"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe has no texts or questions to judge on."""
        return cls() if _is_judging(context) else None

    def settings(self) -> Any:
        """Return None: texts and questions are part of the data's digests."""
        return None

    def fingerprint(self, before: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's fingerprint, with the digests of texts and questions."""
        return {**before, "texts": data["texts"], "questions": data["questions"]}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the peak memory of both models' passes and of their logits."""
        del candidates  # layers compute with dense matrices, however they are stored
        states = 2 * sum(map(work.activations, work.judged))
        # Outputs are compared in float64: the difference, widened and squared.
        comparing = (
            max(sequences.batch_tokens for sequences in work.judged) * work.hidden * (FLOAT32 + 2 * FLOAT64)
        )
        passing = work.layer_weights + max(comparing, *map(work.passing, work.judged))
        # Logits of both models (old ones until new ones exist), and log-probabilities of one window.
        logits = max(
            2 * work.logits(sequences, parts=2) + 5 * FLOAT32 * sequences.length * work.num_logits
            for sequences in work.judged
        )
        return Needs(
            working_bytes=states
            + max(passing, work.layer_load, 2 * work.outside_weights + logits, work.embedding(work.judged)),
            beside_bytes=2 * work.layer_weights,
            # Logits of both models on texts, of one model on questions. The compressed layers are left out,
            # because the run decides how much they compute.
            flops=sum(
                (1 if sequences.pictures else 2) * work.head_flops(sequences) for sequences in work.judged
            ),
        )

    def run(self, run: StageRun) -> Comparison:
        """Stream the compressed model over all texts and questions."""
        comparison_values = run.cache.entry(OUTCOME)
        if comparison_values is None:
            compressed = run.model.stream()
            original_outputs = _KeptOutputs(run.cache_of(JudgeOriginalStage.name), tuple(run.data.texts))
            with run.progress(self.title, compressed.num_layers) as on_layer:
                comparison = judge_compressed(
                    compressed,
                    run.model.original,
                    run.results[JudgeOriginalStage.name],
                    original_outputs.of_layer,
                    run.data.texts,
                    run.data.questions,
                    on_layer,
                )
            comparison_values = _COMPARISON.dump_python(comparison)
            run.cache.write(OUTCOME, comparison_values)
        return _COMPARISON.validate_python(comparison_values)


@dataclass(frozen=True)
class _KeptOutputs:
    """Reads the original's outputs that `JudgeOriginalStage` has written to disk."""

    cache: CacheFolder
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
