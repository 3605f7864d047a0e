"""The recipe's sections about the result: how it is judged and served, what it may weigh, where it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from ercsvd_deploy.format.schema import Bits
from ercsvd_deploy.recipe.fields import (
    ListWithoutRepetition,
    LocalPath,
    Section,
    Size,
    Text,
    parse_size,
    refusal,
    refuse_together,
)
from ercsvd_deploy.recipe.quantize import Correction
from ercsvd_deploy.recipe.sections.inputs import HeldOutText, TextName
from ercsvd_deploy.recipe.sections.vision import VisualQuestions


class LmEval(Section):
    """Tasks of the lm-eval harness; needs the `eval` extra."""

    tasks: ListWithoutRepetition[Text] = Field(min_length=1, description="Names of lm-eval tasks.")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples in the prompt; null: the task's own."
    )
    limit: PositiveInt | None = Field(default=None, description="Documents per task; null: all.")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What runs both models: transformers, or vLLM, as the export is served, in a process of "
        "its own at the smallest of `serving.tensor_parallel_sizes`; vLLM must be installed, and takes text "
        "models only.",
    )
    eager: bool = Field(
        default=False,
        description="Run that vLLM with `enforce_eager`, which starts sooner, instead of as users do: "
        "compiled, and with CUDA graphs where there are any.",
    )
    batch_size: PositiveInt = Field(
        default=8, description="Requests in a batch; vLLM makes batches of its own."
    )
    apply_chat_template: bool = Field(
        default=False, description="Put prompts into the tokenizer's chat template, for instruction models."
    )
    fewshot_as_multiturn: bool = Field(
        default=True,
        description="With the chat template, examples are turns of the conversation, not one long message.",
    )
    include_path: LocalPath | None = Field(
        default=None, description="Directory with lm-eval tasks (YAML files) of your own; null: none."
    )

    @model_validator(mode="after")
    def _eager_is_said_of_vllm(self) -> LmEval:
        if self.eager and self.engine != "vllm":
            refuse_together([(("eager",), "is for `engine: vllm`; remove it, or set that")])
        return self


class Evaluation(Section):
    """How the original and the compressed model are compared."""

    perplexity: Mapping[TextName, HeldOutText] = Field(
        default={},
        json_schema_extra={"additionalProperties": False},
        description="Name of a held-out text -> path of a text file, or a dataset in one of the forms below.",
    )
    sequence_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Tokens in each window; null: calibration's `sequence_length`."
    )
    max_sequences: PositiveInt | None = Field(default=None, description="Windows per text; null: all.")
    visual_questions: Mapping[TextName, VisualQuestions] = Field(
        default={},
        json_schema_extra={"additionalProperties": False},
        description="Name -> questions about held-out pictures, judged by exact match of the greedy answer.",
    )
    lm_eval: LmEval | None = Field(default=None, description="lm-eval tasks to run; null: none.")


class Serving(Section):
    """How the model is meant to be served; the plan refuses what cannot be served so."""

    tensor_parallel_sizes: ListWithoutRepetition[PositiveInt] = Field(
        default=(1,), min_length=1, description="Tensor-parallel sizes the result must work with."
    )


class Export(Section):
    """The directory to write."""

    format: Literal["vllm", "compressed-tensors", "auto-round"] = Field(
        default="vllm",
        description="Kind of directory to write. The other two are read by vLLM without this package and by "
        "transformers with the package of that name, and hold no low-rank matrices. `compressed-tensors` has "
        "integers of 2, 4 and 8 bits, `auto-round` all bits on NVIDIA GPUs, symmetric, in the layers alone.",
    )
    path: LocalPath | None = Field(
        default=None, description="Directory to write; the command line's `--output` comes first."
    )
    max_shard_size: Size = Field(
        default="1GB",
        description="Upper size of a safetensors file: a number and KB, MB, GB, KiB, MiB or GiB. One such "
        "file is in memory while it is written.",
    )

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)


class Target(Section):
    """What the result may weigh; ranks, bits and what stays dense are then chosen together.

    Exactly one of `bytes`, `overall_bits` and `model_bits`; the first and the last count what the quantize
    stage makes of `lm_head` and `embeddings`. What counts is what all GPUs hold together at the smallest of
    `serving.tensor_parallel_sizes`: a factor that each of them has whole, as often as there are GPUs. Without
    a factorize stage bits alone are chosen, of `bits`.
    """

    bytes: Size | None = Field(
        default=None, description="Size of all tensors: a number and KB, MB, GB, KiB, MiB or GiB."
    )
    overall_bits: Annotated[float, Field(gt=0, lt=16)] | None = Field(
        default=None,
        description="Stored bits per original weight over all decoder Linears, scales included.",
    )
    model_bits: Annotated[float, Field(gt=0, lt=16)] | None = Field(
        default=None,
        description="Stored bits of all tensors per original weight of the whole model: embeddings, output "
        "layer, norms and vision parts included.",
    )
    bits: ListWithoutRepetition[Bits] | None = Field(
        default=None,
        min_length=1,
        description="Bits that a quantized dense matrix may have, beside 16; null: the stage's own. vLLM has "
        "kernels for others than 4 on NVIDIA GPUs only; elsewhere such a matrix takes 16. Matrices to which "
        "`quantize.overrides` gives bits have those.",
    )
    factor_bits: ListWithoutRepetition[Bits] | None = Field(
        default=None,
        min_length=1,
        description="Bits that both factors of a low-rank matrix may have; null: the stage's own. Each is "
        "tried, which takes time.",
    )
    group_sizes: ListWithoutRepetition[Literal[32, 64, 128, -1]] | None = Field(
        default=None,
        min_length=1,
        description="Group sizes that a dense quantized matrix may have; null: the stage's own.",
    )
    corrections: ListWithoutRepetition[Correction] = Field(
        default=(),
        description="Low-rank corrections that the integers of a dense matrix may have, such as "
        "`{rank: 32, bits: 4}`, beside none. Each is tried with each of `bits`, which takes time.",
    )

    vocabulary_bits: ListWithoutRepetition[Literal[4, 5, 6, 8]] | None = Field(
        default=None,
        min_length=1,
        description="Bits that the matrices of `quantize.lm_head` and `quantize.embeddings` may have beside "
        "16; null: those that the stage says. For a target that counts them.",
    )

    @model_validator(mode="after")
    def _has_one_measure(self) -> Target:
        if [self.bytes, self.overall_bits, self.model_bits].count(None) != 2:
            raise refusal(
                "has to have exactly one of bytes, overall_bits and model_bits, such as overall_bits: 3.2"
            )
        if self.overall_bits is not None and self.vocabulary_bits is not None:
            text = (
                "is given, but overall_bits counts the decoder alone; use model_bits or bytes, or remove it"
            )
            refuse_together([(("vocabulary_bits",), text)])
        return self
