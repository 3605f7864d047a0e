"""The recipe's sections as frozen models: every key a recipe may have, its type, default and meaning.

A key's description here is the one place it is explained: the JSON schema for editors and
docs/recipes.md are generated from it. `recipe` reads YAML into these models; what can only be judged
between sections (a stage that needs calibration, the order of the stages) is checked by `Recipe`.

No torch here: `ercsvd validate` and editors' tools read a recipe without loading a numerical library.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    StringConstraints,
    Tag,
    model_validator,
)

from ercsvd_deploy.recipe.fields import (
    ListOf,
    ListWithoutRepetition,
    LocalPath,
    Location,
    Section,
    Size,
    Text,
    parse_size,
    refusal,
    refuse_together,
    told_apart_by,
)
from ercsvd_deploy.recipe.gates import BUILT_IN_TEXT, Gates
from ercsvd_deploy.recipe.stages import (
    FEWEST_SAMPLES_TO_HOLD_OUT,
    Factorize,
    FactorizeStage,
    Quantize,
    QuantizeStage,
    Recover,
    RecoverStage,
    Stage,
    kind_of,
)
from ercsvd_deploy.recipe.vision import Vision, VisualQuestions


class ModelSource(Section):
    """The model to compress."""

    path: Text = Field(
        description="Directory of the model, or its name on the Hugging Face Hub. Local paths, here and "
        "elsewhere in a recipe, are relative to the directory the command is started in."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Type of the weights written; `auto` keeps the model's own."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Only for models you trust."
    )


class TextFile(Section):
    """A UTF-8 text file."""

    text: LocalPath = Field(description="Path of a UTF-8 text file.")


class JsonLines(Section):
    """A file with one JSON object a line."""

    jsonl: LocalPath = Field(description="Path of a file with one JSON object a line.")
    field: Text = Field(default="text", description="Key of the text in each object.")


class HubDataset(Section):
    """A dataset on the Hugging Face Hub; needs the `hub` extra."""

    hub: Text = Field(description="Name of a dataset on the Hugging Face Hub.")
    config: Text | None = Field(default=None, description="Configuration (subset) of the dataset.")
    split: Text = Field(default="train", description="Split of the dataset.")
    field: Text = Field(default="text", description="Column of the text.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")


TextDataset = Annotated[
    Annotated[TextFile, Tag("TextFile")]
    | Annotated[JsonLines, Tag("JsonLines")]
    | Annotated[HubDataset, Tag("HubDataset")],
    *told_apart_by({"text": "TextFile", "jsonl": "JsonLines", "hub": "HubDataset"}, "a dataset"),
]


def _path_means_text_file(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


HeldOutText = Annotated[
    TextDataset, BeforeValidator(_path_means_text_file, json_schema_input_type=Text | TextDataset)
]
TextName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Calibration(Section):
    """The data whose activations steer compression."""

    dataset: TextDataset | None = Field(
        default=None,
        description="Text: exactly one of the forms below. Needed unless `vision.calibration` gives it all.",
    )
    num_samples: PositiveInt = Field(default=256, description="Sequences drawn from the dataset.")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens in each sequence.")
    seed: int = Field(default=3, ge=0, lt=2**32, description="Seed of the draw.")


class LmEval(Section):
    """Tasks of the lm-eval harness; needs the `eval` extra."""

    tasks: ListWithoutRepetition[Text] = Field(min_length=1, description="Names of lm-eval tasks.")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples in the prompt; null: the task's own."
    )
    limit: PositiveInt | None = Field(default=None, description="Documents per task; null: all.")
    batch_size: PositiveInt = Field(default=8, description="Requests in a batch.")


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
    """How the model is meant to be served; the plan refuses what cannot be cut into so many parts."""

    tensor_parallel_sizes: ListWithoutRepetition[PositiveInt] = Field(
        default=(1,), min_length=1, description="Tensor-parallel sizes the result must work with."
    )


class Export(Section):
    """The directory to write."""

    format: Literal["vllm"] = Field(default="vllm", description="Kind of directory to write.")
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

    Exactly one of `bytes` and `overall_bits`.
    """

    bytes: Size | None = Field(
        default=None, description="Size of all tensors: a number and KB, MB, GB, KiB, MiB or GiB."
    )
    overall_bits: Annotated[float, Field(gt=0, lt=16)] | None = Field(
        default=None,
        description="Stored bits per original weight over all decoder Linears, scales included.",
    )
    bits: ListWithoutRepetition[Literal[4, 8]] = Field(
        default=(4,),
        min_length=1,
        description="Bits that a quantized matrix may have. vLLM has kernels for 8 bits on GPUs only; on a "
        "CPU such a matrix takes 16.",
    )
    group_sizes: ListWithoutRepetition[Literal[32, 64, 128, -1]] | None = Field(
        default=None, description="Group sizes that a dense quantized matrix may have; null: the stage's own."
    )

    @model_validator(mode="after")
    def _has_one_measure(self) -> Target:
        if (self.bytes is None) == (self.overall_bits is None):
            raise refusal("has to have exactly one of bytes and overall_bits, such as overall_bits: 3.2")
        return self


class Recipe(Section):
    """A model, what to do to it, how to judge the result, and where to write it."""

    model: ModelSource = Field(description="The model to compress.")
    calibration: Calibration | None = Field(
        default=None,
        description="The data whose activations steer compression. Optional if no stage needs it: `svd` with "
        "a given number of layers does not.",
    )
    vision: Vision | None = Field(
        default=None,
        description="Pictures in calibration and the fate of the vision parts, for vision-language models.",
    )
    stages: ListOf[Stage] = Field(
        min_length=1,
        description="What is done to the model, in order: each entry is one stage. Factorization comes "
        "before quantization, each at most once; a recovery may stand behind either or both.",
    )
    target: Target | None = Field(
        default=None,
        description="What the result may weigh, instead of a `compression_ratio`; null: the stages say all. "
        "Needs `allocation: error_controlled`.",
    )
    evaluation: Evaluation = Field(
        default=Evaluation(), description="How the original and the compressed model are compared."
    )
    gates: Gates | None = Field(
        default=None, description="What the result must still be worth; null: nothing is asked of it."
    )
    serving: Serving = Field(default=Serving(), description="How the model is meant to be served.")
    export: Export = Field(default=Export(), description="The directory to write.")

    @property
    def factorize(self) -> Factorize | None:
        """The factorization, if the recipe has one."""
        return next((stage.factorize for stage in self.stages if isinstance(stage, FactorizeStage)), None)

    @property
    def recover(self) -> Recover | None:
        """The recovery of plain factors, if the recipe has one."""
        return self._recovery(quantized=False)

    @property
    def recover_quantized(self) -> Recover | None:
        """The recovery behind the quantization, if the recipe has one."""
        return self._recovery(quantized=True)

    def _recovery(self, *, quantized: bool) -> Recover | None:
        kinds = [kind_of(stage) for stage in self.stages]
        for number, stage in enumerate(self.stages):
            if isinstance(stage, RecoverStage) and ("quantize" in kinds[:number]) is quantized:
                return stage.recover
        return None

    @property
    def quantize(self) -> Quantize | None:
        """The quantization, if the recipe has one."""
        return next((stage.quantize for stage in self.stages if isinstance(stage, QuantizeStage)), None)

    @property
    def picture_share(self) -> float:
        """Share of the calibration samples that are conversations about pictures."""
        if self.vision is None or self.vision.calibration is None:
            return 0.0
        if self.vision.share is not None:
            return self.vision.share
        return 0.5 if self.calibration is not None and self.calibration.dataset is not None else 1.0

    @property
    def evaluation_sequence_length(self) -> int | None:
        """Tokens in a perplexity window; None only where nothing is to be measured."""
        if self.evaluation.sequence_length is not None:
            return self.evaluation.sequence_length
        return self.calibration.sequence_length if self.calibration else None

    @property
    def judged_texts(self) -> tuple[str, ...]:
        """Names of the texts on which quality is measured, the package's own among them if gates want it."""
        adds = self.gates is not None and self.gates.adds_built_in_text
        return (*self.evaluation.perplexity, *([BUILT_IN_TEXT] if adds else []))

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        refuse_together(_find_contradictions(self))
        return self


def _find_contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield the location and the message of everything in which sections contradict each other."""
    yield from _find_disorder(recipe.stages)
    needs = [(number, stage.calibration_need) for number, stage in enumerate(recipe.stages)]
    reasons = [f"{need} (stages.{number})" for number, need in needs if need]
    if recipe.calibration is None and reasons:
        yield (
            ("calibration",),
            f"is missing, but {'; '.join(reasons)}: add calibration: {{dataset: {{text: PATH}}}}",
        )
    yield from _find_calibration_without_data(recipe)
    yield from _find_idle_vision_settings(recipe)
    yield from _find_idle_gates(recipe)
    yield from _find_unclear_budget(recipe)
    if recipe.judged_texts and recipe.evaluation_sequence_length is None:
        yield (
            ("evaluation", "sequence_length"),
            "is missing, and without calibration it has no default: set it, such as 2048",
        )
    if recipe.calibration is not None:
        yield from _find_too_few_samples(recipe.stages, recipe.calibration.num_samples)


def _find_calibration_without_data(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield what of text and pictures is missing, or would not be used."""
    pictures = recipe.vision.calibration if recipe.vision is not None else None
    if recipe.vision is not None and recipe.vision.share is not None and pictures is None:
        yield ("vision", "share"), "is set, but there is no vision.calibration to take pictures from; add it"
    if recipe.calibration is None:
        if pictures is not None:
            yield (
                ("calibration",),
                "is missing: it says how many samples are drawn from vision.calibration; add calibration: {}",
            )
        return
    if recipe.calibration.dataset is None and recipe.picture_share < 1:
        share = (
            f"vision.share {recipe.picture_share:g} leaves a part for text" if pictures else "nothing else is"
        )
        yield (
            ("calibration", "dataset"),
            f"is missing, and {share}: add dataset: {{text: PATH}}",
        )
    num_samples = recipe.calibration.num_samples
    num_pictures = round(recipe.picture_share * num_samples)
    if pictures is not None and recipe.picture_share < 1 and num_pictures in (0, num_samples):
        yield (
            ("vision", "share"),
            f"is {recipe.picture_share:g}, which makes {num_pictures} of {num_samples} samples conversations "
            "about pictures; draw more samples or change the share",
        )
    if recipe.calibration.dataset is not None and recipe.picture_share == 1:
        yield (
            ("calibration", "dataset"),
            "would not be used, since vision.share is 1; lower vision.share or remove the dataset",
        )


def _find_idle_vision_settings(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield settings of the vision section that nothing would follow from."""
    vision, settings = recipe.vision, recipe.factorize
    if vision is None:
        return
    if vision.token_weight != 1 and vision.calibration is None:
        yield (
            ("vision", "token_weight"),
            f"is {vision.token_weight:g}, but without vision.calibration there are no image tokens; add it",
        )
    for field in ("compress_tower", "compress_projector"):
        if not getattr(vision, field):
            continue
        if settings is None:
            yield ("vision", field), "is true, but there is no factorize stage to do it; add one"
        elif settings.method != "svd" and vision.calibration is None:
            yield (
                ("vision", field),
                f"is true, but method {settings.method} measures activations and there is no "
                "vision.calibration to take pictures from; add it",
            )


def _find_unclear_budget(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield what of ratio and target is missing, or said twice."""
    for number, stage in enumerate(recipe.stages):
        if not isinstance(stage, FactorizeStage):
            continue
        where = ("stages", number, "factorize")
        settings = stage.factorize
        if recipe.target is None:
            if settings.compression_ratio is None:
                yield (*where, "compression_ratio"), "is missing; add it, or a target"
            continue
        if settings.compression_ratio is not None:
            yield (*where, "compression_ratio"), "is given beside a target; keep one of the two"
        if settings.allocation != "error_controlled":
            yield (
                (*where, "allocation"),
                f"is {settings.allocation}, but a target needs error_controlled: set that",
            )
    if recipe.target is not None and recipe.vision is not None:
        for field in ("compress_tower", "compress_projector"):
            if getattr(recipe.vision, field):
                yield (
                    ("vision", field),
                    "is true, but a target says nothing about vision parts; give the factorize stage a "
                    "compression_ratio instead of the target, or leave them alone",
                )
    if recipe.target is not None and recipe.factorize is None:
        yield ("target",), "is set, but there is no factorize stage whose ranks could meet it; add one"
    if recipe.target is not None and recipe.quantize is None and recipe.target.group_sizes is not None:
        yield ("target", "group_sizes"), "is set, but there is no quantize stage; add one, or remove it"


def _find_idle_gates(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield the gates for which nothing is measured."""
    gates = recipe.gates
    if gates is None:
        return
    if BUILT_IN_TEXT in recipe.evaluation.perplexity:
        yield (
            ("evaluation", "perplexity", BUILT_IN_TEXT),
            "is the name of the text that comes with this package; choose another",
        )
    if gates.judges_texts and not recipe.judged_texts:
        yield (
            ("gates",),
            "judges texts, but there are none: add evaluation.perplexity, or leave built_in_text on",
        )
    texts: tuple[str, Collection[str]] = ("evaluation.perplexity", recipe.judged_texts)
    measured = dict.fromkeys(gates.text_limits, texts)
    if gates.exact_match_drop is not None:
        measured["exact_match_drop"] = ("evaluation.visual_questions", recipe.evaluation.visual_questions)
    if gates.task_drop is not None:
        tasks = recipe.evaluation.lm_eval.tasks if recipe.evaluation.lm_eval else ()
        measured["task_drop"] = ("evaluation.lm_eval.tasks", tasks)
    for gate, (section, known) in measured.items():
        limit = getattr(gates, gate)
        if not known and gate not in gates.text_limits:
            yield ("gates", gate), f"is set, but there is no {section} to measure it on; add it"
        elif isinstance(limit, Mapping):
            for name in limit:
                if name.partition("/")[0] not in known:
                    listed = ", ".join(known)
                    yield ("gates", gate, name), f"is not measured; {section} has {listed or 'nothing'}"


def _find_disorder(stages: tuple[Stage, ...]) -> Iterator[tuple[Location, str]]:
    """Yield the stages that are there twice, or stand where they have nothing to work on."""
    first_of: dict[str, int] = {}
    for number, stage in enumerate(stages):
        kind = kind_of(stage)
        where = ("stages", number, kind)
        if kind == "recover":
            if not first_of:
                yield where, "has nothing to train yet; put a factorize or quantize stage before it"
            elif kind_of(stages[number - 1]) == "recover":
                yield where, f"repeats stages.{number - 1}.recover; keep one of the two"
        elif kind in first_of:
            yield where, f"repeats stages.{first_of[kind]}.{kind}; keep one of the two"
        elif kind == "factorize" and "quantize" in first_of:
            yield (
                where,
                f"comes after stages.{first_of['quantize']}.quantize, and integers cannot be factorized; "
                "move it before",
            )
        first_of.setdefault(kind, number)


def _find_too_few_samples(stages: tuple[Stage, ...], num_samples: int) -> Iterator[tuple[Location, str]]:
    """Yield the stages that want more sequences than calibration draws."""
    for number, stage in enumerate(stages):
        if isinstance(stage, RecoverStage) and 2 * stage.recover.batch_size > num_samples:
            yield (
                ("stages", number, "recover", "batch_size"),
                f"is {stage.recover.batch_size}, but calibration.num_samples is {num_samples}, which is not "
                "two batches: one to train on, one to judge by; lower batch_size, or draw more samples",
            )
        if (
            isinstance(stage, FactorizeStage)
            and stage.factorize.beta == "auto"
            and num_samples < FEWEST_SAMPLES_TO_HOLD_OUT
        ):
            yield (
                ("stages", number, "factorize", "beta"),
                f"is auto, which holds out a quarter of the sequences, but calibration.num_samples is "
                f"{num_samples}; draw at least {FEWEST_SAMPLES_TO_HOLD_OUT}",
            )
        if isinstance(stage, FactorizeStage) and stage.factorize.searches_layers:
            wanted = stage.factorize.num_search_samples
            if wanted > num_samples:
                yield (
                    ("stages", number, "factorize", "num_search_samples"),
                    f"is {wanted}, but calibration.num_samples is {num_samples}; set num_search_samples to "
                    f"{num_samples} or less, or draw more samples",
                )
