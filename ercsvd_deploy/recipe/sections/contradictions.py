"""Contradictions between the sections of a recipe, each with its location and its remedy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.format.stock_formats import STOCK_FORMATS
from ercsvd_deploy.recipe.gates import BUILT_IN_TEXT
from ercsvd_deploy.recipe.quantize import Correction
from ercsvd_deploy.recipe.stages import (
    FEWEST_SAMPLES_TO_HOLD_OUT,
    FactorizeStage,
    QuantizeStage,
    RecoverStage,
    Stage,
    kind_of,
)

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.fields import Location
    from ercsvd_deploy.recipe.sections.recipe import Recipe


def find_contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield the location and the message of every contradiction between sections."""
    yield from _find_disorder(recipe.stages)
    needs = [(number, stage.calibration_need) for number, stage in enumerate(recipe.stages)]
    reasons = [f"{need} (stages.{number})" for number, need in needs if need]
    if recipe.target is not None and not recipe.may_factorize:
        reasons.append("a target weighs bits by what they do to calibration data")
    if recipe.calibration is None and reasons:
        yield (
            ("calibration",),
            f"is missing, but {'; '.join(reasons)}: add calibration: {{dataset: {{text: PATH}}}}",
        )
    yield from _find_calibration_without_data(recipe)
    yield from _find_idle_vision_settings(recipe)
    yield from _find_idle_gates(recipe)
    yield from _find_unclear_budget(recipe)
    yield from _find_idle_target(recipe)
    yield from _find_unreadable_export(recipe)
    yield from _find_unused_correction(recipe)
    yield from _find_idle_integers(recipe)
    if recipe.judged_texts and recipe.evaluation_sequence_length is None:
        yield (
            ("evaluation", "sequence_length"),
            "is missing, and without calibration it has no default: set it, such as 2048",
        )
    if recipe.calibration is not None:
        yield from _find_too_few_samples(recipe.stages, recipe.calibration.num_samples)


def _find_calibration_without_data(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield calibration text and pictures that are missing or would not be used."""
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
    if not recipe.calibration.sources and recipe.picture_share < 1:
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
    if recipe.calibration.sources and recipe.picture_share == 1:
        yield (
            ("calibration", "dataset"),
            "would not be used, since vision.share is 1; lower vision.share or remove the dataset",
        )


def _find_idle_vision_settings(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield settings of the vision section that have no effect."""
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
    """Yield a compression ratio or target that is missing, or given twice."""
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


def _find_idle_target(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield a target that no stage could meet, and those of its fields that no stage reads."""
    if recipe.target is None:
        return
    if recipe.vision is not None:
        for field in ("compress_tower", "compress_projector"):
            if getattr(recipe.vision, field):
                yield (
                    ("vision", field),
                    "is true, but a target says nothing about vision parts; give the factorize stage a "
                    "compression_ratio instead of the target, or leave them alone",
                )
    if not recipe.may_factorize and recipe.quantize is None:
        yield ("target",), "is set, but there is no stage that could meet it; add factorize or quantize"
    elif not recipe.may_factorize and recipe.target.factor_bits is not None:
        yield ("target", "factor_bits"), "is set, but there is no factorize stage; add one, or remove it"
    if recipe.target.vocabulary_bits is not None and not (
        recipe.quantize is not None and (recipe.quantize.lm_head or recipe.quantize.embeddings)
    ):
        yield (
            ("target", "vocabulary_bits"),
            "is set, but quantize has neither lm_head nor embeddings; add one, or remove it",
        )
    if recipe.quantize is None:
        target_fields = recipe.target.model_dump(exclude_none=True)
        keys = ("bits", "group_sizes", "factor_bits", "corrections")
        for key in [key for key in keys if target_fields.get(key)]:
            yield ("target", key), "is set, but there is no quantize stage; add one, or remove it"


def _find_idle_gates(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield gates whose measurement the recipe does not make."""
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
    for gate, (section, names) in measured.items():
        limit = getattr(gates, gate)
        if not names and gate not in gates.text_limits:
            yield ("gates", gate), f"is set, but there is no {section} to measure it on; add it"
        elif isinstance(limit, Mapping):
            for name in limit:
                if name.partition("/")[0] not in names:
                    listed = ", ".join(names)
                    yield ("gates", gate, name), f"is not measured; {section} has {listed or 'nothing'}"


def _find_unreadable_export(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield an export format that cannot store the stages' results."""
    stock = STOCK_FORMATS.get(recipe.export.format)
    if stock is None:
        return
    if recipe.may_factorize:
        yield (
            ("export", "format"),
            f"is {stock.name}, which has no low-rank matrices; set vllm, or remove the factorize stage",
        )
    elif recipe.quantize is None:
        yield ("export", "format"), f"is {stock.name}, which holds integers; add a quantize stage"
    elif recipe.quantize.corrections:
        yield (
            ("export", "format"),
            f"is {stock.name}, which has no low-rank matrices; set vllm, or remove quantize.correction",
        )
    if recipe.target is not None and recipe.target.corrections:
        yield (
            ("target", "corrections"),
            f"are low-rank, which export.format {stock.name} cannot hold; remove them, or set vllm",
        )
    for key in ("bits", "vocabulary_bits"):
        unreadable = set(getattr(recipe.target, key, None) or ()) - set(stock.bits)
        if unreadable:
            listed = ", ".join(map(str, sorted(unreadable)))
            yield (
                ("target", key),
                f"has {listed}, and {stock.name} and vLLM agree on words of {_enumerated(stock.bits)} bits "
                "only; remove the others, or set export.format: vllm",
            )


def _enumerated(numbers: Collection[int]) -> str:
    """Return numbers as prose has them, such as "2, 4 and 8"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def _find_unused_correction(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield a correction where the factorize stage chooses how every matrix is stored."""
    settings = recipe.factorize
    if settings is None or settings.allocation != "error_controlled":
        return
    chooser = "factorize.allocation error_controlled" if recipe.may_factorize else "a target"
    for number, stage in enumerate(recipe.stages):
        if not isinstance(stage, QuantizeStage):
            continue
        where: Location = ("stages", number, "quantize")
        corrections = {(*where, "correction"): stage.quantize.correction} | {
            (*where, "overrides", pattern, "correction"): change.correction
            for pattern, change in stage.quantize.overrides.items()
        }
        for key, correction in corrections.items():
            if isinstance(correction, Correction):
                yield (
                    key,
                    f"is given beside {chooser}, which chooses how every matrix is stored; remove it, and "
                    "name it in target.corrections",
                )


def _find_idle_integers(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Yield bits and group sizes of the quantize stage that a target's own leave nothing to."""
    target = recipe.target
    if target is None:
        return
    uses_bits_for_factors = recipe.may_factorize and target.factor_bits is None
    offers: dict[str, tuple[str, Collection[int] | None]] = {
        "bits": ("bits", None if uses_bits_for_factors else target.bits),
        "group_size": ("group_sizes", None if recipe.may_factorize else target.group_sizes),
    }
    for number, stage in enumerate(recipe.stages):
        if not isinstance(stage, QuantizeStage):
            continue
        for key, (offer, offered) in offers.items():
            value = getattr(stage.quantize, key)
            if offered is not None and key in stage.quantize.model_fields_set and value not in offered:
                listed = ", ".join(map(str, offered))
                yield (
                    ("stages", number, "quantize", key),
                    f"is {value}, but target.{offer} is [{listed}], of which every matrix gets one; add "
                    f"{value} there, or remove the key here",
                )
        for key in ("lm_head", "embeddings"):
            integers, offered = getattr(stage.quantize, key), target.vocabulary_bits
            if integers and offered and "bits" in integers.model_fields_set and integers.bits not in offered:
                yield (
                    ("stages", number, "quantize", key, "bits"),
                    f"is {integers.bits}, but target.vocabulary_bits is [{', '.join(map(str, offered))}], of "
                    f"which it gets one; add {integers.bits} there, or remove the key here",
                )


def _find_disorder(stages: tuple[Stage, ...]) -> Iterator[tuple[Location, str]]:
    """Yield stages that are repeated, or placed where they have nothing to work on."""
    first_of: dict[str, int] = {}
    for number, stage in enumerate(stages):
        kind = kind_of(stage)
        where = ("stages", number, kind)
        if kind == "recover":
            if not first_of:
                yield where, "has nothing to train yet; put a factorize or quantize stage before it"
            elif isinstance(stage, RecoverStage) and stage.recover.rounding and "quantize" not in first_of:
                yield (*where, "rounding"), "is true, but there are no integers yet; move it behind quantize"
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
    """Yield stages that need more sequences than calibration draws."""
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
            needed = stage.factorize.num_search_samples
            if needed > num_samples:
                yield (
                    ("stages", number, "factorize", "num_search_samples"),
                    f"is {needed}, but calibration.num_samples is {num_samples}; set num_search_samples to "
                    f"{num_samples} or less, or draw more samples",
                )
