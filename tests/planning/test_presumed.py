"""What a plan shows of storages that a target chooses when the recipe runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_allocation
from ercsvd_deploy.pipelines.stages.factorize.ranks.presumed import presumed_storages
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter

FACTORIZE = {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "output_metric": "fisher"}}


def quantize(**fields: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 4, "group_size": 32, **fields}}


def planned(path: Path) -> Plan:
    return make_plan(load_recipe(path))


def bits_of(plan: Plan) -> list[dict[str, int]]:
    return [dict(layer.bits) for layer in plan.candidates[0].layers]


@pytest.mark.parametrize("asked", [4.6, 5.0, 6.3, 7.7, 9.1, 15.0])
def test_bits_spend_the_budget_evenly(asked: float, write_recipe: RecipeWriter) -> None:
    plan = planned(write_recipe(quantize(), target={"overall_bits": asked, "bits": [2, 4, 8]}))
    (candidate,) = plan.candidates
    step = (8 if asked < 9.1 else 32) / plan.num_layers  # bits a weight of a layer that gets more
    assert asked - step < candidate.linear_bits_per_weight <= asked
    for layer in bits_of(plan):
        assert len(set(layer.values())) <= 1, "the matrices of a layer are alike"
    widths = [min(layer.values(), default=32) for layer in bits_of(plan)]
    assert widths == sorted(widths, reverse=True)


def test_ranks_are_stored_in_the_fewest_bits_on_offer(write_recipe: RecipeWriter) -> None:
    target = {"overall_bits": 2.4, "bits": [3, 4, 8], "factor_bits": [3, 4]}
    (candidate,) = planned(write_recipe(FACTORIZE, quantize(), target=target)).candidates
    assert candidate.linear_bits_per_weight == pytest.approx(2.4, rel=0.2)
    assert any(rank is not None for layer in candidate.layers for rank in layer.ranks.values())


@pytest.mark.parametrize(
    ("bits", "multiple", "layout", "asked"),
    [
        (4, 24, "low_rank", 1.8),
        (4, 32, "low_rank", 4.0),
        (4, 32, "pivoted", 3.0),
        (8, 20, "pivoted", 4.0),
        (8, 32, "pivoted", 5.0),
    ],
)
def test_steps_of_ranks_do_not_exceed_the_budget(
    bits: int, multiple: int, layout: str, asked: float, write_recipe: RecipeWriter
) -> None:
    stage = {"factorize": FACTORIZE["factorize"] | {"rank_multiple": multiple, "layout": layout}}
    path = write_recipe(stage, quantize(bits=bits), target={"overall_bits": asked})
    (candidate,) = planned(path).candidates
    assert candidate.linear_bits_per_weight <= asked


def test_an_ignored_matrix_keeps_its_weights(write_recipe: RecipeWriter) -> None:
    path = write_recipe(FACTORIZE, quantize(ignore=["*.o_proj"]), target={"overall_bits": 6.0})
    recipe = load_recipe(path)
    task = plan_allocation(recipe, read_architecture(load_config(recipe.model.path)), 2)
    for name, costs in task.costs.items():
        is_whole = {storage.layout == "dense" and storage.weight is None for storage in costs}
        assert (is_whole == {True}) == name.endswith("o_proj")


def test_a_target_above_the_fewest_bits_is_met_without_ranks(write_recipe: RecipeWriter) -> None:
    target = {"overall_bits": 6.0, "bits": [3, 4], "factor_bits": [3, 4]}
    (candidate,) = planned(write_recipe(FACTORIZE, quantize(), target=target)).candidates
    assert candidate.linear_bits_per_weight <= 6.0
    assert all(rank is None for layer in candidate.layers for rank in layer.ranks.values())


def test_an_override_has_its_bits_whatever_is_on_offer(write_recipe: RecipeWriter) -> None:
    overrides = {"down_proj": {"bits": 8}, "o_proj": {"group_size": 64}, "q_proj": {"correction": "none"}}
    target = {
        "overall_bits": 6.0,
        "bits": [2, 3, 4],
        "group_sizes": [32, 128],
        "corrections": [{"rank": 16, "bits": 8}],
    }
    path = write_recipe(quantize(overrides=overrides), target=target)
    recipe = load_recipe(path)
    architecture = read_architecture(load_config(recipe.model.path))
    task = plan_allocation(recipe, architecture, 2)

    def offered(name: str) -> list[Storage]:
        return list(task.costs[f"model.layers.1.{name}"])

    assert {s.weight and s.weight.bits for s in offered("mlp.down_proj")} == {8}
    assert {s.weight and s.weight.bits for s in offered("mlp.up_proj")} == {2, 3, 4, None}
    assert {s.weight.group_size for s in offered("self_attn.o_proj") if s.weight} == {64}
    assert {s.layout for s in offered("self_attn.q_proj")} == {"dense"}
    assert {s.layout for s in offered("self_attn.k_proj")} == {"dense", "corrected"}
    storages = presumed_storages(task, {})
    assert sum(task.costs[name][storage] for name, storage in storages.items()) <= task.budget
    assert all(layer["mlp.down_proj"] == 8 for layer in bits_of(planned(path)))


def test_the_stage_has_the_bits_if_the_target_offers_none(write_recipe: RecipeWriter) -> None:
    plan = planned(write_recipe(quantize(bits=3), target={"overall_bits": 5.0}))
    assert {bits for layer in bits_of(plan) for bits in layer.values()} == {3}


@pytest.mark.parametrize(
    ("stages", "target", "warned"),
    [
        ((quantize(),), {"bits": [4, 8]}, "no kernel for 8-bit weights on a CPU"),
        ((FACTORIZE, quantize()), {"bits": [4], "factor_bits": [3, 4]}, "no kernel for 3-bit weights"),
        ((quantize(),), {"bits": [4]}, None),
    ],
)
def test_bits_on_offer_without_a_kernel_are_warned_of(
    stages: tuple[dict[str, Any], ...],
    target: dict[str, Any],
    warned: str | None,
    write_recipe: RecipeWriter,
) -> None:
    warnings = planned(write_recipe(*stages, target={"overall_bits": 5.1, **target})).warnings
    found = [warning for warning in warnings if "no kernel for" in warning]
    assert len(found) == (warned is not None)
    assert all(str(warned) in warning for warning in found)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"overall_bits": 3.0, "bits": [4]},
            r"target\.overall_bits is 3, .* least that is possible is 5\.\d",
        ),
        ({"model_bits": 3.0, "bits": [4]}, r"target\.model_bits is 3, .* least that is possible is \d+\.\d"),
        ({"bytes": "1KB", "bits": [4]}, r"target\.bytes is 1KB, .* least that is possible is \d+\.?\d*KB"),
        ({"bytes": "0.1MiB", "bits": [4]}, r"bytes is 0\.1MiB, .* least that is possible is \d\.\d{3}MiB"),
    ],
)
def test_an_impossible_target_is_answered_in_its_own_unit(
    target: dict[str, Any], message: str, write_recipe: RecipeWriter
) -> None:
    with pytest.raises(PlanError, match=message):
        planned(write_recipe(quantize(), target=target))


@pytest.mark.parametrize(
    ("measure", "asked"), [("overall_bits", 3.0), ("model_bits", 3.0), ("bytes", "0.1MiB"), ("bytes", "1KB")]
)
def test_the_least_that_is_possible_is_accepted(
    measure: str, asked: float | str, write_recipe: RecipeWriter
) -> None:
    with pytest.raises(PlanError, match="least that is possible") as refused:
        planned(write_recipe(quantize(), target={measure: asked, "bits": [4]}))
    least = str(refused.value).split("possible is ")[1].split(":")[0]
    target = {measure: least if measure == "bytes" else float(least), "bits": [4]}
    assert planned(write_recipe(quantize(), target=target)).candidates


@pytest.mark.parametrize(
    ("stages", "target", "export_format", "told", "untold"),
    [
        ((quantize(),), {"bits": [4]}, "vllm", "target.bits or ranks by a factorize stage", "overrides"),
        ((quantize(),), {}, "vllm", "fewer bits in quantize.bits", "target.bits"),
        ((quantize(),), {"bits": [4]}, "auto-round", "fewer bits in target.bits", "factorize"),
        ((quantize(overrides={"*": {"bits": 8}}),), {"bits": [4]}, "vllm", "in quantize.overrides", "ignore"),
        ((quantize(ignore=["down_proj"]),), {"bits": [4]}, "vllm", "less in quantize.ignore", "overrides"),
    ],
)
def test_remedies_of_an_impossible_target_fit_the_recipe(
    stages: tuple[dict[str, Any], ...],
    target: dict[str, Any],
    export_format: str,
    told: str,
    untold: str,
    write_recipe: RecipeWriter,
    tmp_path: Path,
) -> None:
    export = {"format": export_format, "path": str(tmp_path / "out")}
    with pytest.raises(PlanError, match="least that is possible") as refused:
        planned(write_recipe(*stages, target={"overall_bits": 3.0, **target}, export=export))
    assert told in str(refused.value)
    assert untold not in str(refused.value)


VOCABULARY = {"lm_head": {"bits": 4}, "embeddings": {"bits": 8}}


@pytest.mark.parametrize(
    ("stage", "target", "export_format", "told"),
    [
        ({}, {"overall_bits": 1.0, "bits": [2, 4]}, "vllm", ": allow more, or ranks by a factorize stage"),
        ({}, {"overall_bits": 1.0, "bits": [2, 4]}, "auto-round", ": allow more"),
        (
            {"overrides": {"q_proj": {"bits": 2}}},
            {"overall_bits": 1.0, "bits": [2, 4]},
            "auto-round",
            ": allow more",
        ),
        (
            {"embeddings": {"bits": 4}},
            {"model_bits": 1.0, "bits": [2, 4]},
            "vllm",
            ": allow more, or ranks by a factorize stage or fewer bits for what is outside the layers "
            "(quantize.lm_head)",
        ),
        (
            {"lm_head": {"bits": 4}},
            {"model_bits": 1.0, "bits": [2, 4]},
            "compressed-tensors",
            ": allow more",
        ),
        (
            {"ignore": ["*"], "lm_head": {"bits": 4}, "embeddings": {"bits": 4}},
            {"model_bits": 1.0},
            "vllm",
            ": allow more, or less in quantize.ignore or ranks by a factorize stage",
        ),
        (
            VOCABULARY,
            {"model_bits": 1.0, "bits": [2, 4]},
            "vllm",
            ": allow more, or fewer bits in quantize.embeddings or ranks by a factorize stage",
        ),
        (
            {"group_size": -1},
            {"overall_bits": 3.2, "bits": [3, 4]},
            "auto-round",
            ": allow more; export.format auto-round leaves out 3 bits with group_size -1, which has one "
            "scale a row: vLLM reads this format's 3 bits in groups of columns; give group_size 128 or 64 or "
            "32",
        ),
    ],
)
def test_remedies_can_help(
    stage: dict[str, Any],
    target: dict[str, Any],
    export_format: str,
    told: str,
    write_recipe: RecipeWriter,
    tmp_path: Path,
) -> None:
    export = {"format": export_format, "path": str(tmp_path / "out")}
    with pytest.raises(PlanError, match="least that is possible") as refused:
        planned(write_recipe(quantize(**stage), target=target, export=export))
    assert str(refused.value).endswith(told)


@pytest.mark.parametrize("asked", [1e-8, 3e-7, 1.0])
def test_the_least_that_is_possible_does_not_depend_on_what_is_asked(
    asked: float, write_recipe: RecipeWriter
) -> None:
    with pytest.raises(PlanError, match=r"the least that is possible is 3\.007:"):
        planned(write_recipe(quantize(), target={"overall_bits": asked, "bits": [2, 4]}))


def test_group_sizes_of_a_target_are_not_held_against_the_stages(write_recipe: RecipeWriter) -> None:
    """Groups of 128 would not fit the columns on a GPU, but none has them."""
    target = {"overall_bits": 8.0, "bits": [4, 8], "group_sizes": [32]}
    serving = {"tensor_parallel_sizes": [2]}
    stage = {"quantize": {"bits": 4, "group_size": 128}}
    without = {"overall_bits": 8.0, "bits": [4, 8]}
    assert any(
        "get groups of" in w for w in planned(write_recipe(stage, target=without, serving=serving)).warnings
    )
    stage = {"quantize": {"bits": 4}}
    assert not any(
        "get groups of" in w for w in planned(write_recipe(stage, target=target, serving=serving)).warnings
    )


def test_only_what_the_format_holds_is_on_offer(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """AutoRound's has three bits in groups alone; a target may choose of the rest."""
    for asked in (4.6, 5.5, 12.0):
        target = {"overall_bits": asked, "bits": [3, 4], "group_sizes": [32, -1]}
        export = {"format": "auto-round", "path": str(tmp_path / "out")}
        recipe = load_recipe(write_recipe(quantize(), target=target, export=export))
        task = plan_allocation(recipe, read_architecture(load_config(recipe.model.path)), 4)
        offered = {storage.weight for costs in task.costs.values() for storage in costs}
        assert {(w.bits, w.group_size) for w in offered if w} == {(3, 32), (4, 32), (4, -1)}
        assert make_plan(recipe).candidates


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({"q_proj": {"bits": 8}}, None),  # k_proj and v_proj can have 8, too
        ({"q_proj": {"bits": 8}, "k_proj": {"bits": 4}}, "no integers that all of them can have"),
        ({"q_proj": {"sym": False}}, "overrides set model.layers.0.self_attn.q_proj apart"),
        ({"down_proj": {"bits": 3}}, "has 3 bits: compressed-tensors and vLLM agree"),
    ],
)
def test_one_way_for_what_stock_vllm_stacks(
    overrides: dict[str, Any], refused: str | None, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe(
        quantize(overrides=overrides),
        target={"overall_bits": 7.0, "bits": [2, 4, 8]},
        export={"format": "compressed-tensors", "path": str(tmp_path / "out")},
    )
    if refused is not None:
        with pytest.raises(PlanError, match=refused):
            planned(path)
        return
    for layer in bits_of(planned(path)):
        assert {layer[f"self_attn.{name}_proj"] for name in "qkv"} == {8}


def test_a_stack_with_an_ignored_part_is_refused_for_it(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    path = write_recipe(
        quantize(ignore=["q_proj"]),
        target={"overall_bits": 15.0, "bits": [4, 8]},
        export={"format": "auto-round", "path": str(tmp_path / "out")},
    )
    with pytest.raises(PlanError, match=r"q_proj is ignored: ignore all of them, or none"):
        planned(path)
