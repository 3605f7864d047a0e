"""The quantize stage: GPTQ of every decoder Linear, of routed experts, and of embedding and output layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.format.schema import FACTOR_PARTS, Storage
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.quantize.experts.tables import experts_table, pooling_warning
from ercsvd_deploy.pipelines.stages.quantize.planning.needs import quantize_needs
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import (
    QuantizePlan,
    check_expert_shapes,
    check_num_tokens,
    check_shapes,
    quantize_plan_of,
)
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizeOutcome
from ercsvd_deploy.pipelines.stages.sensitivity.stage import SensitivityStage
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.stages import FEWEST_SAMPLES_TO_HOLD_OUT

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.inputs.run_data import RunData
    from ercsvd_deploy.pipelines.stages.quantize.results import (
        QuantizedEmbedding,
        QuantizedLinear,
        QuantizedMatrix,
    )
    from ercsvd_deploy.pipelines.stages.quantize.vocabulary import VocabularyQuantizer
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload

_MOST_OF_THE_ENERGY = 0.5  # of a Linear's inputs, in one direction


@dataclass(frozen=True)
class QuantizeStage(Stage):
    """The stage with the planned storage of every decoder Linear.

    Attributes:
        quantize: The recipe's stage.
        storing: The planned storage of every Linear.
        architecture: The model's architecture.
        tensor_parallel_sizes: The sizes at which the model will be served.
        is_on_trained_factors: Whether factors come from recovery or were fitted to the inputs of the
            compressed prefix; they then approximate more than the original weights.
        num_fisher_samples: Calibration samples on which the Fisher information of the Linears' outputs was
            measured, if corrections are fitted with it.
        bits_are_chosen: Whether a target chooses the bits.
    """

    quantize: Quantize
    storing: QuantizePlan
    architecture: Architecture
    tensor_parallel_sizes: Sequence[int]
    is_on_trained_factors: bool
    num_fisher_samples: int | None = None
    bits_are_chosen: bool = False

    name = "quantize"
    reported_as = QuantizeOutcome

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe does not quantize.

        Raises:
            QuantizePlanError: a pattern matches nothing, nothing is left to quantize, or calibration draws
                too few tokens.
        """
        recipe = context.recipe
        if recipe.quantize is None:
            return None
        measured = context.planned.get(SensitivityStage.name)
        num_fisher_samples = None
        if recipe.corrects_by_sensitivity and isinstance(measured, SensitivityStage):
            num_fisher_samples = measured.num_samples
        storing = quantize_plan_of(recipe, context.architecture)
        has_pictures = recipe.vision is not None and recipe.vision.calibration is not None  # more tokens
        if recipe.calibration is not None and not has_pictures:
            most = recipe.calibration.num_samples * recipe.calibration.sequence_length
            check_num_tokens(storing, recipe.quantize, context.architecture, most)
        on_prefix = recipe.factorize is not None and recipe.factorize.compressed_prefix_inputs
        return cls(
            recipe.quantize,
            storing,
            context.architecture,
            recipe.serving.tensor_parallel_sizes,
            is_on_trained_factors=on_prefix or recipe.recover is not None,
            num_fisher_samples=num_fisher_samples,
            bits_are_chosen=recipe.target is not None,
        )

    @property
    def title(self) -> str:
        """Method and bits."""
        corrected = ", corrected" if self.quantize.corrections else ""
        bits = "bits by the target" if self.bits_are_chosen else f"{self.quantize.bits} bits"
        return f"{self.quantize.method}, {bits}{corrected}"

    def settings(self) -> Any:
        """Return the recipe's stage, and what else integers depend on.

        Fisher information is temporary, so its settings are not among those of the stages before.
        """
        fitted = self.storing.fitted_to
        return self.quantize.model_dump(mode="json") | {
            "fitted_to": None if fitted is None else list(fitted),
            "num_fisher_samples": self.num_fisher_samples,
            "held_out_from": FEWEST_SAMPLES_TO_HOLD_OUT,
        }

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates with the quantized storage of every decoder Linear.

        Raises:
            QuantizePlanError: a shape cannot be stored, or cannot be loaded at some tensor parallel size.
        """
        quantized_candidates = []
        experts = self.storing.describe_experts(self.architecture)
        check_expert_shapes(experts, self.architecture, self.tensor_parallel_sizes)
        routed_names = {linear.name for linear in self.architecture.expert_linears}
        for candidate in candidates:
            ranks = {name: storage.truncated_rank for name, storage in candidate.modules.items()}
            described = check_shapes(self.storing, ranks, self.architecture, self.tensor_parallel_sizes)
            # A target may leave a matrix as it is, which then is no changed one.
            stored = {**candidate.modules, **described, **experts, **candidate.presumed}
            altered = {name: storage for name, storage in stored.items() if storage.is_altered}
            routed = {name: altered.pop(name) for name in stored if name in routed_names and name in altered}
            quantized_candidates.append(replace(candidate, modules=altered, experts=routed))
        return quantized_candidates

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the peak needs of quantizing a layer."""
        return quantize_needs(work, candidates)

    def check_data(self, data: RunData) -> Iterable[str]:
        """Return a warning if there are few tokens for GPTQ.

        Raises:
            QuantizePlanError: there are too few.
        """
        assert data.samples is not None, "the schema asks for calibration where a stage needs it"
        num_tokens = sum(len(sample.tokens) for sample in data.samples)
        return check_num_tokens(self.storing, self.quantize, self.architecture, num_tokens)

    def run(self, run: StageRun) -> QuantizeOutcome:
        """Quantize layer by layer."""
        from ercsvd_deploy.pipelines.stages.quantize.decoder import quantize_decoder

        storages = self._storages(run.results.get("factorize"))
        vocabulary = self._quantize_embedding(run, storages)
        model = run.model.stream()
        with run.progress(self.title, model.num_layers) as on_layer:
            outcome = quantize_decoder(
                model,
                run.model.original.store,
                run.samples,
                self.quantize,
                storages,
                self.storing.matches,
                run.cache,
                on_layer,
                refits_to_factors=self.is_on_trained_factors,
                token_sensitivity=run.results.get("token_sensitivity"),
                sensitivity=run.results.get("sensitivity") if self.num_fisher_samples is not None else None,
                vocabulary=vocabulary,
            )
        integers = {name: storage for name, storage in storages.items() if storage.is_quantized}
        run.model.overlay(outcome.files, integers)
        return outcome

    def _quantize_embedding(
        self, run: StageRun, storages: Mapping[str, Storage]
    ) -> VocabularyQuantizer | None:
        """Quantize the embedding, which needs no pass; return the quantizer of the output layer.

        If layers are measured on the served model, they are measured on the quantized embedding, too.
        """
        names = self.architecture.vocabulary.names
        vocabulary_storages = {name: storage for name, storage in storages.items() if name in names}
        if not vocabulary_storages:
            return None
        from ercsvd_deploy.pipelines.stages.quantize.vocabulary import VocabularyQuantizer

        vocabulary = VocabularyQuantizer(
            self.quantize,
            self.architecture.vocabulary,
            vocabulary_storages,
            run.model.original.store,
            run.model.device,
            run.cache,
        )
        file, embedding = vocabulary.round_embedding(), vocabulary.embedding
        if file is not None and embedding is not None and self.quantize.compressed_prefix_inputs:
            run.model.overlay([file], {embedding.name: vocabulary_storages[embedding.name]})
        return vocabulary

    def _storages(self, factorized: Any) -> Mapping[str, Storage]:
        """Return name -> final storage of every changed Linear, given the choices of the factorize stage."""
        chosen_storages = None if factorized is None else factorized.chosen.storages
        if chosen_storages is not None:
            storages = {**self.storing.vocabulary, **chosen_storages}
            return {name: storage for name, storage in storages.items() if storage.is_altered}
        ranks = {} if factorized is None else factorized.plan.ranks
        architecture = self.architecture
        return self.storing.describe(ranks, architecture) | self.storing.describe_experts(architecture)

    def tables(self, result: QuantizeOutcome) -> Iterable[Table]:
        """Yield a table of the proxy losses by kind of matrix, then tables of every matrix and Linear."""
        kinds: dict[str, list[QuantizedMatrix]] = {}
        for matrix in result.matrices:
            end = matrix.name.rpartition(".")[2]
            kind = "dense" if matrix.routed_tokens is None else "routed experts"
            if matrix.name == result.output_layer:
                kind = "output layer"
            kinds.setdefault(end if end in FACTOR_PARTS else kind, []).append(matrix)
        columns = ("matrix", "count", "GPTQ", "rounding", "GPTQ taken")
        rows = tuple(
            (
                kind,
                str(len(matrices)),
                f"{sum(matrix.gptq_loss for matrix in matrices) / len(matrices):.5f}",
                f"{sum(matrix.rtn_loss for matrix in matrices) / len(matrices):.5f}",
                str(sum(matrix.method == "gptq" for matrix in matrices)),
            )
            for kind, matrices in kinds.items()
        )
        yield Table("Quantized matrices, mean relative proxy loss", columns, rows, columns[1:])
        yield from _embedding_table(result.embedding)
        yield from experts_table(result.matrices)
        yield _matrix_table(matrix for matrix in result.matrices if matrix.routed_tokens is None)
        yield _linear_table(result.linears)
        yield from _correction_table(result.linears)
        yield from _dominated_table(result.linears)

    def warnings(self, result: QuantizeOutcome) -> Iterable[str]:
        """Return a warning with the number of routed experts that have too few tokens."""
        return pooling_warning(result.matrices)


def _embedding_table(embedding: QuantizedEmbedding | None) -> Iterable[Table]:
    """Yield a table with the relative error of a quantized embedding; none if it is not quantized."""
    if embedding is None:
        return
    columns = ("matrix", "bits", "group", "relative error")
    group = "row" if embedding.group_size < 0 else str(embedding.group_size)
    row = (embedding.name, str(embedding.bits), group, f"{embedding.error:.6f}")
    yield Table("Quantized input embedding", columns, (row,), columns[1:])


def _dominated_table(linears: Iterable[QuantizedLinear]) -> Iterable[Table]:
    """Yield a table of the Linears whose inputs have most of their energy in one direction."""
    dominated = [linear for linear in linears if (linear.leading_share or 0) > _MOST_OF_THE_ENERGY]
    columns = ("inputs of", "share of the energy")
    rows = tuple(
        (linear.name, f"{100 * (linear.leading_share or 0):.0f} %")
        for linear in sorted(dominated, key=lambda linear: -(linear.leading_share or 0))
    )
    if rows:
        yield Table("Inputs that one direction rules", columns, rows, columns[1:], is_detail=True)


def _matrix_table(matrices: Iterable[QuantizedMatrix]) -> Table:
    columns = ("matrix", "shape", "bits", "group", "method", "GPTQ loss", "rounding loss")
    rows = tuple(
        (
            matrix.name,
            f"{matrix.shape[0]:,} \N{MULTIPLICATION SIGN} {matrix.shape[1]:,}",
            str(matrix.bits),
            "row" if matrix.group_size < 0 else str(matrix.group_size),
            {"gptq": "GPTQ", "rtn": "rounding"}[matrix.method],
            f"{matrix.gptq_loss:.5f}",
            f"{matrix.rtn_loss:.5f}",
        )
        for matrix in matrices
    )
    return Table("Quantized matrices", columns, rows, columns[1:], is_detail=True)


def _linear_table(linears: Iterable[QuantizedLinear]) -> Table:
    """One row per quantized Linear; for a factorized one with the loss after each step."""
    columns = ("Linear", "not quantized", "first quantized", "re-fitted", "as served")
    rows = tuple(
        (
            linear.name,
            *(
                ("", "", "")
                if linear.factors is None
                else (
                    f"{linear.factors.loss_unquantized:.5f}",
                    f"{linear.factors.loss_first_quantized:.5f}",
                    f"{linear.factors.loss_refitted:.5f}",
                )
            ),
            f"{linear.loss:.5f}",
        )
        for linear in linears
    )
    title = "Quantized Linears, relative proxy loss step by step"
    return Table(title, columns, rows, columns[1:], is_detail=True)


def _correction_table(linears: Iterable[QuantizedLinear]) -> Iterable[Table]:
    """Yield a table of the Linears with a low-rank correction, round by round; none if there are none."""
    corrected = [(linear, linear.correction) for linear in linears if linear.correction is not None]
    if not corrected:
        return
    num_rounds = max(len(report.loss_by_round) for _, report in corrected)
    columns = ("Linear", "rank", "integers alone", *(f"round {count + 1}" for count in range(num_rounds)))
    rows = []
    for linear, report in corrected:
        losses = [f"{loss:.5f}" for loss in (report.loss_uncorrected, *report.loss_by_round)]
        unused = [""] * (num_rounds - len(report.loss_by_round))
        rows.append((linear.name, str(report.rank), *losses, *unused))
    title = "Low-rank corrections of integers, relative proxy loss round by round"
    yield Table(title, columns, tuple(rows), columns[1:], is_detail=True)
