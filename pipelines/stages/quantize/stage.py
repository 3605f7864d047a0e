"""The quantize stage: every decoder Linear as the recipe and the stages before want it stored, by GPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.format.schema import FACTOR_PARTS, Storage
from ercsvd_deploy.models.architecture import Architecture
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.quantize.expert_tables import experts_table, pooling_warning
from ercsvd_deploy.pipelines.stages.quantize.needs import quantize_needs
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizeOutcome
from ercsvd_deploy.pipelines.stages.quantize.storage_plan import (
    QuantizePlan,
    check_expert_shapes,
    check_num_tokens,
    check_shapes,
    quantize_plan_of,
)
from ercsvd_deploy.recipe.quantize import Quantize

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
    """How every decoder Linear is stored, and what the stage is quantized with.

    Attributes:
        quantize: The recipe's stage.
        storing: How the recipe wants every Linear stored.
        architecture: The model's.
        tensor_parallel_sizes: At which the model is to be served.
        is_on_trained_factors: Whether factors come from recovery or were made for the inputs of the
            compressed prefix: they then stand for more than the original weights.
        is_weighed: Whether corrections are fitted by the Fisher information of the Linears' outputs.
        bits_are_chosen: Whether a target chooses among other bits than the stage's.
    """

    quantize: Quantize
    storing: QuantizePlan
    architecture: Architecture
    tensor_parallel_sizes: Sequence[int]
    is_on_trained_factors: bool
    is_weighed: bool = False
    bits_are_chosen: bool = False

    name = "quantize"
    reported_as = QuantizeOutcome

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe does not quantize.

        Raises:
            QuantizePlanError: a pattern matches nothing, or nothing is left to quantize.
        """
        recipe = context.recipe
        if recipe.quantize is None:
            return None
        on_prefix = recipe.factorize is not None and recipe.factorize.compressed_prefix_inputs
        return cls(
            recipe.quantize,
            quantize_plan_of(recipe, context.architecture),
            context.architecture,
            recipe.serving.tensor_parallel_sizes,
            is_on_trained_factors=on_prefix or recipe.recover is not None,
            is_weighed=recipe.corrects_by_sensitivity,
            bits_are_chosen=recipe.target is not None,
        )

    @property
    def title(self) -> str:
        """Method and bits."""
        corrected = ", corrected" if self.quantize.corrections else ""
        bits = "bits by the target" if self.bits_are_chosen else f"{self.quantize.bits} bits"
        return f"{self.quantize.method}, {bits}{corrected}"

    def settings(self) -> Any:
        """Return the recipe's stage, and what groups are made to fit."""
        fitted = self.storing.fitted_to
        return self.quantize.model_dump(mode="json") | {"fitted_to": None if fitted is None else list(fitted)}

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Give every decoder Linear its integers.

        Raises:
            QuantizePlanError: a shape cannot be stored, or cannot be loaded at some tensor parallel size.
        """
        stored = []
        experts = self.storing.describe_experts(self.architecture)
        check_expert_shapes(experts, self.architecture, self.tensor_parallel_sizes)
        for before in candidates:
            ranks = {name: storage.truncated_rank for name, storage in before.modules.items()}
            check_shapes(self.storing, ranks, self.architecture, self.tensor_parallel_sizes)
            described = self.storing.describe(ranks, self.architecture)
            stored.append(replace(before, modules={**before.modules, **described}, experts=experts))
        return stored

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return what a layer takes at its highest."""
        return quantize_needs(work, candidates)

    def check_data(self, data: RunData) -> Iterable[str]:
        """Say if there are few tokens for GPTQ.

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
                sensitivity=run.results.get("sensitivity") if self.is_weighed else None,
                vocabulary=vocabulary,
            )
        integers = {name: storage for name, storage in storages.items() if storage.is_quantized}
        run.model.overlay(outcome.files, integers)
        return outcome

    def _quantize_embedding(
        self, run: StageRun, storages: Mapping[str, Storage]
    ) -> VocabularyQuantizer | None:
        """Return what quantizes the output layer; the embedding, which takes no pass, is quantized already.

        Where layers are measured on what is served before them, that includes the embedding.
        """
        names = self.architecture.vocabulary.names
        outside = {name: storage for name, storage in storages.items() if name in names}
        if not outside:
            return None
        from ercsvd_deploy.pipelines.stages.quantize.vocabulary import VocabularyQuantizer

        vocabulary = VocabularyQuantizer(
            self.quantize,
            self.architecture.vocabulary,
            outside,
            run.model.original.store,
            run.model.device,
            run.cache,
        )
        file, embedding = vocabulary.round_embedding(), vocabulary.embedding
        if file is not None and embedding is not None and self.quantize.compressed_prefix_inputs:
            run.model.overlay([file], {embedding.name: outside[embedding.name]})
        return vocabulary

    def _storages(self, factorized: Any) -> Mapping[str, Storage]:
        """Return how every altered Linear is stored in the end, given what the factorize stage chose."""
        chosen = None if factorized is None else factorized.chosen.storages
        if chosen is not None:
            stored = {**self.storing.vocabulary, **chosen}
            return {name: storage for name, storage in stored.items() if storage.is_altered}
        ranks = {} if factorized is None else factorized.plan.ranks
        architecture = self.architecture
        return self.storing.describe(ranks, architecture) | self.storing.describe_experts(architecture)

    def tables(self, result: QuantizeOutcome) -> Iterable[Table]:
        """Summarise the proxy losses by kind of matrix, then list every matrix and Linear."""
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
        yield _matrix_table(each for each in result.matrices if each.routed_tokens is None)
        yield _linear_table(result.linears)
        yield from _correction_table(result.linears)
        yield from _ruled_table(result.linears)

    def warnings(self, result: QuantizeOutcome) -> Iterable[str]:
        """Say how many routed experts got too few tokens."""
        return pooling_warning(result.matrices)


def _embedding_table(embedding: QuantizedEmbedding | None) -> Iterable[Table]:
    """Tell how far the rows that are looked up are from the original ones; nothing if they are those."""
    if embedding is None:
        return
    columns = ("matrix", "bits", "group", "relative error")
    group = "row" if embedding.group_size < 0 else str(embedding.group_size)
    row = (embedding.name, str(embedding.bits), group, f"{embedding.error:.6f}")
    yield Table("Quantized input embedding", columns, (row,), columns[1:])


def _ruled_table(linears: Iterable[QuantizedLinear]) -> Iterable[Table]:
    """Name the Linears whose inputs one direction rules: their Grams tell little of anything else."""
    ruled = [each for each in linears if (each.leading_share or 0) > _MOST_OF_THE_ENERGY]
    columns = ("inputs of", "share of the energy")
    rows = tuple(
        (each.name, f"{100 * (each.leading_share or 0):.0f} %")
        for each in sorted(ruled, key=lambda each: -(each.leading_share or 0))
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
    """Every factorized Linear in the steps in which its loss arose; a dense one has no steps."""
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
    """Every Linear with a low-rank correction, round by round; nothing if there is none."""
    corrected = [(linear, linear.correction) for linear in linears if linear.correction is not None]
    if not corrected:
        return
    num_rounds = max(len(fitted.loss_by_round) for _, fitted in corrected)
    columns = ("Linear", "rank", "integers alone", *(f"round {count + 1}" for count in range(num_rounds)))
    rows = []
    for linear, fitted in corrected:
        losses = [f"{loss:.5f}" for loss in (fitted.loss_uncorrected, *fitted.loss_by_round)]
        unused = [""] * (num_rounds - len(fitted.loss_by_round))
        rows.append((linear.name, str(fitted.rank), *losses, *unused))
    title = "Low-rank corrections of integers, relative proxy loss round by round"
    yield Table(title, columns, tuple(rows), columns[1:], is_detail=True)
