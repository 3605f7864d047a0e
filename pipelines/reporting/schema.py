"""What `ercsvd_report.json` may say: the model by which reports are read, and from which they are documented.

`report` writes these values; a test sends real reports through here and back. Keys that are not known are
ignored, so that a newer minor version's report can be read. A measured number is null where it is not finite.
`report_reference` publishes the JSON schema and docs/report.md from the descriptions below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ercsvd_deploy.format.atomic_files import read_json
from ercsvd_deploy.pipelines.judging.check import REPORT_FILE, REPORT_VERSION

Count = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[tuple[Count, Count], Field(description="Outputs and inputs.")]


class ReportError(ValueError):
    """A directory has no report, or one that cannot be read."""


class Part(BaseModel):
    """One part of a report."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Figures(Part):
    """Size and quality of one model."""

    num_bytes: Count = Field(description="Bytes of all tensors, tied ones once.")
    bytes_by_part: dict[str, Count] = Field(description="The same, by what they belong to.")
    linear_bits_per_weight: float = Field(
        description="Stored bits of the decoder's Linears, scales included, for each original weight."
    )
    parameters: Count = Field(description="All parameters.")
    linear_parameters: Count = Field(description="Parameters of the decoder's Linears.")
    perplexity: dict[str, float | None] = Field(default={}, description="Text -> perplexity.")
    exact_match: dict[str, float | None] = Field(
        default={}, description="Set of questions about pictures -> share answered word for word."
    )
    tasks: dict[str, dict[str, float | None]] = Field(
        default={}, description="lm-eval task -> metric -> value."
    )


class Component(Part):
    """What became of the language model, the vision tower or the projector."""

    name: str = Field(description="Which of them.")
    original_parameters: Count = Field(description="Its parameters before.")
    parameters: Count = Field(description="Its parameters now.")
    num_bytes: Count = Field(description="Its bytes now.")
    treatment: str = Field(description="`left alone`, or how many of its Linears are stored in which way.")


class OutputChange(Part):
    """How far the outputs on each text are from the original's."""

    layer_errors: dict[str, list[float | None]] = Field(
        default={},
        description="Text -> relative error (Frobenius) of every decoder layer's output, from the first on.",
    )
    final_layer_error: dict[str, float | None] = Field(default={}, description="Text -> the last of these.")
    logprob_kl: dict[str, float | None] = Field(
        default={},
        description="Text -> mean KL divergence of the next-token distribution from the original's, in nats "
        "per token.",
    )


class FactorizedLinear(Part):
    """What factorization made of one Linear."""

    name: str = Field(description="The module's name.")
    shape: Shape = Field(description="Outputs and inputs.")
    rank: Count | None = Field(description="Rank of its factors; null where it was left dense.")
    residual_rank: Count | None = Field(
        default=None, description="What of the rank belongs to the residual; null where there is none."
    )
    weight_error: float | None = Field(description="||W - BA|| / ||W|| (Frobenius).")
    calibration_error: float | None = Field(
        default=None,
        description="||(W - BA) X|| / ||W X|| on the calibration data; null without such data. With "
        "`compressed_prefix_inputs` ||W X - BA X'|| / ||W X||, X' the inputs from compressed layers.",
    )
    spectrum: list[tuple[Count, float | None]] = Field(
        default=[],
        description="Positions from 1, and singular values (in the method's metric) relative to the first.",
    )


class VisionOutcome(Part):
    """What factorization made of the vision parts."""

    linears: list[FactorizedLinear] = Field(description="Its Linears.")


class SearchPoint(Part):
    """One number of compressed layers that was tried."""

    num_compressed_layers: Count = Field(description="How many of the last layers are compressed.")
    layer_ratio: float = Field(description="Share of the parameters removed in each of them.")
    kept_parameters: Count = Field(description="Parameters of the decoder's Linears that this leaves.")
    final_layer_error: float | None = Field(
        description="Relative error of the last layer's output on the search sequences; null if not measured."
    )


class AllocatedLinear(Part):
    """What error-controlled allocation chose for a Linear."""

    name: str = Field(description="The module's name.")
    chosen: str = Field(description="How it is stored.")
    bits_per_weight: float | None = Field(description="Stored bits for each original weight.")
    predicted_kl: float | None = Field(description="Divergence that the choice adds, in nats per token.")
    alternatives: list[tuple[str, float | None, float | None]] = Field(
        description="What else there was: label, bits per weight, nats; the cheapest first."
    )


class FactorizeOutcome(Part):
    """What the factorize stage found and did."""

    num_compressed_layers: Count = Field(description="How many of the last layers are compressed.")
    layer_ratio: float = Field(description="Share of the parameters removed in each of them.")
    parameter_budget: Count = Field(description="Parameters of the decoder's Linears that were allowed.")
    kept_parameters: Count = Field(description="Parameters that the factors and dense Linears have.")
    achieved_compression_ratio: float = Field(description="Share of the decoder Linears' parameters removed.")
    search: list[SearchPoint] = Field(description="The search over the number of compressed layers.")
    linears: list[FactorizedLinear] = Field(description="Every Linear of the compressed layers.")
    allocation: list[AllocatedLinear] = Field(
        default=[], description="What error-controlled allocation chose; empty without it."
    )
    predicted_kl: float | None = Field(
        default=None, description="What its choices add together, in nats per token; null without it."
    )


class RecoveredLayer(Part):
    """What training made of one layer."""

    layer: Count = Field(description="Index of the decoder layer.")
    error_before: float | None = Field(
        description="Mean over held-out tokens of |o - t|^2 / |t|^2, o the layer's output, t the original's, "
        "with the layer as it came."
    )
    error_after: float | None = Field(description="The same after training.")
    is_kept: bool = Field(description="Whether the trained layer was taken.")


class RecoverOutcome(Part):
    """What the recover stage did."""

    layers: list[RecoveredLayer] = Field(description="Every compressed layer.")


class QuantizedMatrix(Part):
    """What became of one matrix: a dense weight, or one factor."""

    name: str = Field(description="The module's name, and which factor.")
    shape: Shape = Field(description="Outputs and inputs.")
    bits: Count = Field(description="Bits of each integer.")
    group_size: int = Field(description="Weights that share a scale; -1: a whole row.")
    sym: bool = Field(description="Whether there are no zero points.")
    method: Literal["gptq", "rtn"] = Field(description="What was taken: GPTQ, or rounding to nearest.")
    gptq_loss: float | None = Field(description="Relative proxy loss tr(E G E') / tr(W G W') of GPTQ.")
    rtn_loss: float | None = Field(description="The same of rounding to nearest.")


class MatrixLosses(Part):
    """Relative proxy losses of one matrix of a pair."""

    gptq_loss: float | None = Field(description="Of GPTQ.")
    rtn_loss: float | None = Field(description="Of rounding to nearest.")


class FactorLosses(Part):
    """The loss of a pair of factors, in the steps in which it arose."""

    factor_a: MatrixLosses = Field(description="The first factor, or the pivot rows.")
    factor_b: MatrixLosses = Field(description="The second factor as re-fitted, or the other rows.")
    loss_unquantized: float | None = Field(description="Of the product, nothing quantized.")
    loss_first_quantized: float | None = Field(description="With the first factor quantized.")
    loss_refitted: float | None = Field(description="After the second was re-fitted to that.")
    loss: float | None = Field(description="With both quantized: what is served.")


class QuantizedLinear(Part):
    """The loss of a whole Linear against the original weight."""

    name: str = Field(description="The module's name.")
    loss: float | None = Field(description="Relative proxy loss of what is served.")
    factors: FactorLosses | None = Field(description="Of a factorized Linear: the steps.")


class PatternMatch(Part):
    """What one pattern of the quantize stage matched."""

    pattern: str = Field(description="As the recipe has it.")
    purpose: str = Field(description="`ignore` or `override`.")
    modules: list[str] = Field(description="Names of the Linears.")


class QuantizeOutcome(Part):
    """What the quantize stage found and did."""

    matrices: list[QuantizedMatrix] = Field(description="Every quantized matrix.")
    linears: list[QuantizedLinear] = Field(description="Every quantized Linear.")
    patterns: list[PatternMatch] = Field(default=[], description="What the recipe's patterns matched.")


class LogprobDifference(Part):
    """Absolute differences between vLLM's log-probabilities and this package's own."""

    mean: float | None = Field(description="Mean, in nats.")
    largest: float | None = Field(description="Largest, in nats.")
    num_tokens: Count = Field(description="Tokens compared.")


class ServingAgreement(Part):
    """How far vLLM is from this package on prompts of one kind."""

    subject: Literal["texts", "pictures"] = Field(description="What the prompts are about.")
    num_prompts: Count = Field(description="How many.")
    prompt: LogprobDifference = Field(description="Of the prompts' own tokens, image tokens excepted.")
    decoded: LogprobDifference = Field(
        description="Of the tokens that vLLM generated greedily; this package has read the same ones before."
    )
    together: LogprobDifference = Field(description="Of both.")
    greedy_agreeing: Count = Field(
        description="How many of the generated tokens are this package's most probable ones too."
    )


class ServingSize(Part):
    """What was measured at one tensor-parallel size."""

    tensor_parallel_size: Count = Field(description="Devices, or workers on a CPU.")
    mode: str = Field(description="How vLLM ran: `eager`, `compiled` or `compiled, with CUDA graphs`.")
    seconds: float = Field(description="What it took, the start included.")
    agreements: list[ServingAgreement] = Field(description="On texts, and on pictures if there were any.")


class ServingFailure(Part):
    """Why vLLM did not serve the export at one tensor-parallel size."""

    tensor_parallel_size: Count = Field(description="Devices, or workers on a CPU.")
    process: str = Field(
        description="The process that failed first, as vLLM calls it; empty where that is not known."
    )
    exception: str = Field(description="Its exception, or how it died.")
    excerpt: str = Field(description="What it printed about that, such as its traceback.")
    log: str | None = Field(
        description="File with all that vLLM printed, beside the export; null if it was not started."
    )


class ServingParity(Part):
    """Difference between vLLM's log-probabilities of tokens and this package's own."""

    mean_difference: float | None = Field(
        description="What the gate judges: the largest of all means, of every size, of texts and pictures, "
        "of prompts and of decoding, in nats; null if vLLM failed at a size. Reports without `sizes` have "
        "the mean over the prompts' tokens at one size."
    )
    largest_difference: float | None = Field(description="Largest absolute value of all, in nats.")
    num_tokens: Count = Field(description="Tokens compared, at all sizes together.")
    tensor_parallel_size: Count | None = Field(
        description="Where the mean is largest; null if nothing was measured."
    )
    vllm_version: str = Field(description="Version of vLLM; empty if it never started.")
    sizes: list[ServingSize] = Field(default=[], description="Every size that was measured.")
    failures: list[ServingFailure] = Field(default=[], description="Every size at which vLLM failed.")
    not_measured: dict[str, str] = Field(
        default={}, description="Tensor-parallel size that this machine cannot run -> why."
    )


class GateResult(Part):
    """One gate for one text, set of questions or task."""

    gate: str = Field(description="The gate's key in the recipe.")
    subject: str | None = Field(description="The text, set of questions or task; null: the whole model.")
    limit: float | None = Field(description="The largest value allowed.")
    value: float | None = Field(description="What was measured; null if nothing was.")
    passed: bool = Field(description="Whether the value is within the limit.")
    reason: str | None = Field(
        default=None, description="Why nothing was measured, on one line, where that is known."
    )

    @property
    def name(self) -> str:
        """Gate and subject, as people name it."""
        return self.gate if self.subject is None else f"{self.gate}, {self.subject}"


class Reference(Part):
    """Another model to compare with, such as plain GPTQ in a sweep; a single run has none."""

    label: str = Field(description="What it is.")
    num_bytes: Count = Field(description="Bytes of all tensors.")
    perplexity: dict[str, float | None] = Field(default={}, description="Text -> perplexity.")
    exact_match: dict[str, float | None] = Field(default={}, description="Set of questions -> share right.")


class ReportDocument(Part):
    """Everything a run tells, as it is stored beside the model."""

    report_version: Literal[2] = Field(description="Version of this format.")
    recipe: dict[str, Any] = Field(
        description="The recipe with every default written out; itself a valid recipe (docs/recipes.md)."
    )
    environment: dict[str, str] = Field(
        default={}, description="Versions of Python and the libraries, the device and the number of threads."
    )
    provenance: dict[str, Any] = Field(
        default={},
        description="Seed, and SHA-256 sums of the recipe, this package's code, the model's files, the "
        "calibration samples, the texts and the questions.",
    )
    original: Figures = Field(description="The model before.")
    compressed: Figures = Field(description="The model now.")
    components: list[Component] = Field(
        default=[], description="Parts of the model: one for a text model, three for a vision-language model."
    )
    change: OutputChange = Field(default=OutputChange(), description="How far the outputs moved.")
    factorize: FactorizeOutcome | None = Field(
        default=None, description="The factorize stage; null without one."
    )
    vision: VisionOutcome | None = Field(
        default=None, description="Factorized vision parts; null if they were left alone."
    )
    recover: RecoverOutcome | None = Field(
        default=None, description="The recovery of plain factors; null without one."
    )
    quantize: QuantizeOutcome | None = Field(
        default=None, description="The quantize stage; null without one."
    )
    recover_quantized: RecoverOutcome | None = Field(
        default=None, description="The recovery behind quantization, of scales; null without one."
    )
    serving: ServingParity | None = Field(
        default=None, description="The export in vLLM; null if the recipe has no such gate."
    )
    gates: list[GateResult] = Field(default=[], description="The recipe's gates, judged; empty without any.")
    references: list[Reference] = Field(
        default=[], description="Other models beside which this one is shown."
    )
    seconds: dict[str, float] = Field(default={}, description="Stage -> time it took in this run.")
    warnings: list[str] = Field(default=[], description="What a user should know.")
    resumed: list[str] = Field(default=[], description="What was found of an earlier, unfinished run.")


def parse_report(report: dict[str, Any], origin: str = REPORT_FILE) -> ReportDocument:
    """Return a report with its types checked.

    Args:
        report: Plain JSON values.
        origin: Where they come from, for messages.

    Raises:
        ReportError: it is of another version, or damaged; the message names the first wrong field.
    """
    version = report.get("report_version")
    if version != REPORT_VERSION:
        raise ReportError(
            f"{origin} has report_version {version!r}, this version reads {REPORT_VERSION}: run the recipe "
            "again"
        )
    try:
        return ReportDocument.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{origin} is damaged: {where}: {first['msg']}") from error


def load_report(directory: Path) -> ReportDocument:
    """Return the report of an export or of a point of a sweep.

    Raises:
        ReportError: there is none, or it cannot be read.
    """
    path = directory / REPORT_FILE
    report = read_json(path)
    if not isinstance(report, dict):
        found = "is damaged" if path.exists() else "is not there"
        raise ReportError(f"{path} {found}: give the directory of a finished run")
    return parse_report(report, str(path))
