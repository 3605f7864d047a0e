"""The `gates` section of a recipe: limits on the compressed model's quality and size. No torch here.

What reports, sweeps and checks of a recipe need to know of a gate stands in `GATES`; it is judged in
`pipelines.judging.gates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ercsvd_deploy.recipe.fields import Section, Size, Text, expects, quoted, refusal

BUILT_IN_TEXT = "built_in_prose"  # name of the text that comes with the package

Limit = Annotated[float, Field(ge=0)]
LimitFor = Annotated[
    Limit | Mapping[Text, Limit], expects("a number of at least 0, or a mapping of names to such numbers")
]


Difference = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class GateKind:
    """What is known of a gate beside its limit.

    Attributes:
        label: The quantity that it limits, as reports name it.
        unit: The unit of limit and measurement; empty for a plain number.
        is_per_text: It has a limit for every text.
        reads_predictions: It reads next-token predictions, which not every model makes.
        needs_export: Only an export can be judged by it.
    """

    label: str
    unit: Literal["percent", "points", "nats", "bytes", ""]
    is_per_text: bool = False
    reads_predictions: bool = False
    needs_export: bool = False


# Name of a field of `Gates` -> what is known of it.
GATES: Mapping[str, GateKind] = {
    "perplexity_increase": GateKind(
        "Increase of perplexity", "percent", is_per_text=True, reads_predictions=True
    ),
    "logprob_kl": GateKind("Log-prob KL", "nats", is_per_text=True, reads_predictions=True),
    "final_layer_error": GateKind("Final-layer error", "", is_per_text=True),
    "exact_match_drop": GateKind("Loss of exact match", "points"),
    "task_drop": GateKind("Loss of accuracy", "points", needs_export=True),
    "max_size": GateKind("Size", "bytes"),
    "max_size_ratio": GateKind("Size against the original", "percent"),
    "serving_parity": GateKind("Difference of vLLM's log-probs", "nats", needs_export=True),
}


class ServingParityGate(Section):
    """Whether vLLM computes what this package does: the limit, and how vLLM is run to find out."""

    mean_difference: Difference = Field(
        description="Largest mean absolute difference, in nats, between vLLM's log-probabilities of tokens "
        "and this package's own in float32. It holds for every tensor-parallel size that is measured, for "
        "texts and for pictures, for the prompts' tokens and for those that vLLM generates greedily behind "
        "them. A correct program in bfloat16 differs by a few hundredths."
    )
    eager: bool = Field(
        default=False,
        description="Run vLLM with `enforce_eager`, which starts sooner, instead of as users do: compiled, "
        "and with CUDA graphs where there are any.",
    )


def _number_means_limit(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"mean_difference": value}
    if not isinstance(value, Mapping | ServingParityGate):
        raise refusal(f"is {quoted(value)}; it must be a number above 0, or a mapping with mean_difference")
    return value


class Gates(Section):
    """What the result must still be worth. A missed gate makes `run` and `check` exit with code 3.

    A number holds for every text (set of questions, task); a mapping names those that are to be judged.
    """

    perplexity_increase: LimitFor | None = Field(
        default=None, description="Largest relative increase of the perplexity on a text; 0.1 is 10 %."
    )
    logprob_kl: LimitFor | None = Field(
        default=None,
        description="Largest mean KL divergence of the next-token distribution from the original's on a "
        "text, in nats per token.",
    )
    final_layer_error: LimitFor | None = Field(
        default=None,
        description="Largest relative error (Frobenius) of the last decoder layer's output on a text.",
    )
    exact_match_drop: LimitFor | None = Field(
        default=None,
        description="Largest loss of exact match on a set of `evaluation.visual_questions`; 0.02 is 2 "
        "points.",
    )
    task_drop: LimitFor | None = Field(
        default=None,
        description="Largest loss of accuracy on a task of `evaluation.lm_eval`; 0.02 is 2 points. Judged "
        "is `acc_norm`, else `acc`, else `exact_match`; `TASK/METRIC` names another.",
    )
    max_size: Size | None = Field(
        default=None, description="Largest size of all tensors: a number and KB, MB, GB, KiB, MiB or GiB."
    )
    max_size_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest size of all tensors as a share of the original's."
    )
    serving_parity: (
        Annotated[
            ServingParityGate,
            BeforeValidator(_number_means_limit, json_schema_input_type=Difference | ServingParityGate),
        ]
        | None
    ) = Field(
        default=None,
        description="The export is loaded in vLLM, which must be installed, at every size of "
        "`serving.tensor_parallel_sizes` for which this machine has the GPUs (or, for vLLM's CPU build, the "
        "cores), and must compute there what it should. A number is the `mean_difference` of the mapping "
        "below. Where vLLM fails, all it printed is kept beside the export, as `NAME.vllm.log`.",
    )
    built_in_text: bool = Field(
        default=True,
        description=f"Judge English prose that comes with this package too, as `{BUILT_IN_TEXT}`: low rank "
        "with few bits breaks first on what calibration has not seen. Set false where the recipe has such "
        "a text itself.",
    )

    @property
    def judges_texts(self) -> bool:
        """Whether a gate reads measurements on texts."""
        return bool(self.text_limits) or self.serving_parity is not None

    @property
    def adds_built_in_text(self) -> bool:
        """Whether the built-in text is judged too."""
        return self.built_in_text and self.judges_texts

    def without_export(self) -> Gates | None:
        """Return the gates that can be judged without an export; None if there are none."""
        needing = {name for name, kind in GATES.items() if kind.needs_export}
        judgeable = self.model_dump(exclude_none=True, exclude=needing)
        return Gates.model_validate(judgeable) if set(judgeable) - {"built_in_text"} else None

    @property
    def text_limits(self) -> dict[str, float | Mapping[str, float]]:
        """Gate -> limit, for the gates that can have a limit for each text."""
        named = {name: getattr(self, name) for name, kind in GATES.items() if kind.is_per_text}
        return {name: limit for name, limit in named.items() if limit is not None}

    @model_validator(mode="after")
    def _judges_something(self) -> Gates:
        if not self.model_fields_set - {"built_in_text"}:
            raise refusal("has no gate; give one, such as perplexity_increase: 0.1, or remove the section")
        empty = [name for name in self.model_fields_set if getattr(self, name) == {}]
        if empty:
            raise refusal(f"has an empty {empty[0]}; give a number, or names and numbers")
        return self
