"""Recipes that name no ranks: what suits the matrices is chosen, and never refused for its ranks."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from ercsvd_deploy.budget.rank_steps import RankSteps, automatic_step, fixed_steps
from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.exporters.vllm.kernels.choice import ACCELERATORS
from ercsvd_deploy.format.schema import LowRankLayout, Storage
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.planning.plan import make_plan, plan_stages
from ercsvd_deploy.pipelines.reporting.screen.plan_tables import render
from ercsvd_deploy.pipelines.stages.factorize.stage import FactorizeStage
from ercsvd_deploy.pipelines.stages.factorize.vision.stage import VisionStage
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlanError
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.sections import Recipe
from tests.planning.public_configs import LLAMA_3_8B, PUBLIC_MODELS, QWEN2_5_72B, SMOLLM2_135M, text_config

NATURAL = ({"factorize": {"method": "erc_svd", "compression_ratio": 0.2}},)
INT4 = {"quantize": {"bits": 4, "group_size": 64}}
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2")


def raw_recipe(model: Path, *stages: Any, sizes: Any = (1,), **sections: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration.txt"},
            "num_samples": 256,
            "sequence_length": 512,
            "seed": 3,
        },
        "stages": list(stages),
        "serving": {"tensor_parallel_sizes": list(sizes)},
        "export": {"path": str(model.parent / "out")},
        **sections,
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Return a function that writes a directory of a config.json alone."""

    def write(config: Mapping[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


# The steps


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((4096, 4096), 128),
        ((1024, 4096), 128),  # Llama-3-8B's k_proj, break-even at 819
        ((512, 3584), 64),  # Qwen2.5-7B's, at 448
        ((256, 2048), 32),  # Qwen2.5-3B's, at 227
        ((768, 256), 32),
        ((256, 256), 16),
        ((40, 40), 2),
        ((8, 8), 1),
        ((1, 5), 1),
    ],
)
def test_step_is_as_large_as_gpus_like_and_the_matrix_affords(shape: tuple[int, int], step: int) -> None:
    assert automatic_step(LinearShape("m", 0, *shape), "low_rank") == step


@pytest.mark.parametrize(
    ("shape", "group_size", "step"),
    [
        ((4096, 4096), 64, 128),
        ((512, 3584), 128, 128),  # one group is below break-even
        ((256, 256), 32, 32),
        ((256, 256), -1, 32),  # kernels' blocks
        ((256, 256), 64, 64),
        ((256, 256), 128, 64),  # 128 would be break-even itself
        ((40, 40), 64, 8),  # not even 32: whole words of integers
    ],
)
def test_second_factor_gets_a_group_where_that_is_below_break_even(
    shape: tuple[int, int], group_size: int, step: int
) -> None:
    assert automatic_step(LinearShape("m", 0, *shape), "low_rank", group_size=group_size) == step


@pytest.mark.parametrize(("whole_words", "step"), [(8, 8), (16, 16), (32, 32)])
def test_step_fills_whole_words_where_no_group_fits(whole_words: int, step: int) -> None:
    small = LinearShape("m", 0, 40, 40)
    assert automatic_step(small, "low_rank", group_size=64, whole_words=whole_words) == step


SHAPES = st.builds(
    lambda out, columns: LinearShape("m", 0, out, columns), st.integers(1, 3000), st.integers(1, 3000)
)
LAYOUTS = st.sampled_from(["low_rank", "pivoted"])


@given(shape=SHAPES, layout=LAYOUTS)
def test_step_leaves_six_steps_and_twice_of_it_would_not(shape: LinearShape, layout: LowRankLayout) -> None:
    step = automatic_step(shape, layout)

    def affords(rank: int) -> bool:
        return rank <= min(shape.out_features, shape.in_features) and (
            shape.kept_parameters(rank, layout) <= shape.parameters
        )

    assert step in (1, 2, 4, 8, 16, 32, 64, 128)
    assert step == 1 or affords(6 * step)
    assert step == 128 or not affords(12 * step)


@given(
    shape=SHAPES, layout=LAYOUTS, preferred=st.sampled_from([1, 8, 32, 128]), floor=st.sampled_from([1, 8])
)
def test_steps_are_halved_down_to_the_finest(
    shape: LinearShape, layout: LowRankLayout, preferred: int, floor: int
) -> None:
    preferred = max(preferred, floor)
    levels = list(RankSteps({"m": preferred}, {"m": floor}).coarse_to_fine())
    assert [level.steps["m"] for level in levels] == [
        preferred >> halvings for halvings in range(round(math.log2(preferred / floor)) + 1)
    ]
    for level in levels:
        step = level.steps["m"]
        halves = {preferred >> halvings for halvings in range(8) if preferred >> halvings >= step}
        expected = [
            rank
            for rank in range(1, min(shape.out_features, shape.in_features) + 1)
            if (rank % preferred == 0 or rank in halves)
            and shape.kept_parameters(rank, layout) < shape.parameters
        ]
        assert level.ranks_on_offer(shape, layout) == expected


def test_number_of_the_recipe_is_never_made_finer() -> None:
    [only] = fixed_steps([LinearShape("m", 0, 64, 64)], 24).coarse_to_fine()
    assert only.steps == {"m": 24}
    assert only.ranks_on_offer(LinearShape("m", 0, 64, 64), "low_rank") == [24]


# Public models


def test_groups_fit_what_a_gpu_holds(write_config: Callable[[Mapping[str, Any]], Path]) -> None:
    directory = write_config(QWEN2_5_72B | {"num_hidden_layers": 3})
    down_proj = 29568

    def groups(sizes: list[int]) -> tuple[set[int], set[int], tuple[str, ...]]:
        recipe = Recipe.model_validate(raw_recipe(directory, *NATURAL, INT4, sizes=sizes))
        config = load_config(str(directory))
        candidates = plan_stages(recipe, config, architecture_of(directory), "bfloat16")[-1].candidates
        firsts: set[int] = set()
        others: set[int] = set()
        for candidate in candidates:
            for name, description in candidate.modules.items():
                for part, ((_, columns), storage) in description.parts.items():
                    assert storage is not None
                    of_down_proj = name.endswith("down_proj") and part in ("", "factor_a")
                    assert (columns == down_proj) == of_down_proj
                    (firsts if of_down_proj else others).add(storage.group_size)
        return firsts, others, make_plan(recipe).warnings

    assert groups([1, 2])[:2] == ({64}, {64})
    firsts, others, warnings = groups([1, 2, 4])  # 7,392 columns on a GPU are 115.5 groups of 64
    assert (firsts, others) == ({32}, {64})
    assert any("3 matrices" in each and "get groups of 32" in each for each in warnings)
    firsts, others, warnings = groups([8])  # 3,696: not even whole groups of 32
    assert (firsts, others) == ({-1}, {64})
    assert any("get one scale a row, which may cost accuracy" in each for each in warnings)


def test_named_multiple_is_taken_at_its_word(write_config: Callable[[Mapping[str, Any]], Path]) -> None:
    directory = write_config(LLAMA_3_8B)
    stage = {"factorize": NATURAL[0]["factorize"] | {"rank_multiple": 32}}
    with pytest.raises(
        QuantizePlanError, match=r"factor_b .*group_size -1, 32 would, or rank_multiple 64 or auto"
    ):
        make_plan(Recipe.model_validate(raw_recipe(directory, stage, INT4)))
    directory = write_config(QWEN2_5_72B)
    stage = {"factorize": NATURAL[0]["factorize"] | {"rank_multiple": 128}}
    with pytest.raises(
        QuantizePlanError, match=r"down_proj.* at tensor parallel size 4: group_size 64 does not"
    ):
        make_plan(Recipe.model_validate(raw_recipe(directory, stage, INT4, sizes=[1, 4])))


def test_heads_that_cannot_be_shared_out_are_refused(
    write_config: Callable[[Mapping[str, Any]], Path],
) -> None:
    directory = write_config(SMOLLM2_135M)
    with pytest.raises(PlanError, match=r"size 2: 9 attention heads, 3 of them .* sizes that work: 1, 3, 9"):
        make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, sizes=[1, 2])))
    make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, INT4, sizes=[1, 3])))
    directory = write_config(text_config("llama", 96, 250, 2, 8, 4))
    with pytest.raises(PlanError, match=r"size 4: the 250 outputs of .*gate_proj cannot be cut into 4"):
        make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, sizes=[1, 2, 4])))


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_vision_parts_get_ranks_of_their_own(
    layout: str, ratio: float, write_config: Callable[[Mapping[str, Any]], Path]
) -> None:
    directory = write_config(PUBLIC_MODELS["LLaVA-1.5-7B"])
    stage = {"factorize": {"method": "svd_llm", "compression_ratio": ratio, "layout": layout}}
    pictures = {"conversations": "examples/pictures/calibration.jsonl"}
    vision = {"compress_tower": True, "compress_projector": True, "share": 0.5, "calibration": pictures}
    recipe = Recipe.model_validate(raw_recipe(directory, stage, INT4, sizes=[1, 2, 4, 8], vision=vision))
    [stage_of_vision] = [stage for stage in make_plan(recipe).stages if isinstance(stage, VisionStage)]
    ranks = stage_of_vision.ranks
    assert ranks
    assert {rank % 64 for rank in ranks.values()} == {0}  # [1024, 1024] has its break-even at 512


# Any model


def architecture_of(directory: Path) -> Architecture:
    config = load_config(str(directory))
    return describe(build_meta_model(config), config)


@pytest.fixture(scope="module")
def described() -> dict[str, Architecture]:
    """Architectures by name, described once for all examples."""
    return {}


NEIGHBOURS = {
    "SmolLM2-135M": (SMOLLM2_135M | {"num_hidden_layers": 6}, (1,)),
    "hidden 96": (text_config("llama", 96, 256, 8, 8, 4, 1000, head_dim=12), (1, 2, 4, 8)),
    "hidden 96, odd": (text_config("qwen2", 96, 200, 4, 8, 2, 1000), (1, 2, 4, 8)),
    "hidden 40": (text_config("llama", 40, 104, 4, 8, 8, 1000, head_dim=6), (1, 2, 4, 8)),
    "hidden 40, one head": (text_config("mistral", 40, 96, 4, 2, 1, 1000, head_dim=8), (1, 2)),
    "hidden 8": (text_config("llama", 8, 16, 2, 2, 1, 1000), (1, 2)),
    "hidden 256": (text_config("qwen3", 256, 768, 4, 8, 4, 1000, head_dim=32), (1, 2, 4, 8)),
    "hidden 896": (text_config("qwen2", 896, 4864, 4, 14, 2, 1000), (1, 2)),
    "OPT of 64": (text_config("opt", 64, 256, 4, 4, 4, 1000), (1, 2, 4)),
}


def is_possible(factorize: dict[str, Any], architecture: Architecture, sizes: tuple[int, ...]) -> bool:
    """Whether any ranks reach a ratio, by the cost of the smallest: one, or as many pivots as GPUs."""
    ratio, num_layers = Fraction(str(factorize["compression_ratio"])), architecture.num_layers
    layout: LowRankLayout = factorize["layout"]
    beta = Fraction("0.05") if factorize["method"] == "erc_svd" else Fraction(0)
    smallest = {}
    for linear in architecture.linears:
        rank = 1
        if layout == "pivoted" and not linear.name.endswith(ROW_PARALLEL):
            rank = max(architecture.num_output_shards(linear.name, size) for size in sizes)
        rows, columns = linear.out_features, linear.in_features
        costs = [rows * columns]
        if rank <= min(rows, columns):
            costs.append(rank * (rows + columns - (rank if layout == "pivoted" else 0)))
        smallest[linear.name] = min(costs)
    total = architecture.linear_parameters
    if factorize["allocation"] == "error_controlled":
        return sum(smallest.values()) <= (1 - ratio) * total
    all_k: Any = range(1, num_layers + 1)
    if factorize["allocation"] == "uniform" or factorize["num_compressed_layers"] == "all":
        all_k = [num_layers]
    elif factorize["num_compressed_layers"] != "auto":
        all_k = [factorize["num_compressed_layers"]]
    for k in all_k:
        compressed = [each for each in architecture.linears if each.layer >= num_layers - k]
        may_keep = sum(each.parameters for each in compressed) - ratio * total
        if may_keep > beta * sum(each.parameters for each in compressed) and (
            sum(smallest[each.name] for each in compressed) <= math.floor(may_keep)
        ):
            return True
    return False


def cannot_be_loaded(name: str, description: Storage, architecture: Architecture, size: int) -> str | None:
    """Say what of a Linear would lie across two GPUs, from the meaning of the format alone."""
    row_parallel = name.endswith(ROW_PARALLEL)
    blocks = description.pivot_blocks
    if blocks is not None and not row_parallel and blocks % architecture.num_output_shards(name, size):
        return f"{blocks} blocks of pivots"
    for part, ((_, columns), storage) in description.parts.items():
        cut = row_parallel and part in ("", "factor_a", "pivot_rows")
        on_gpu = Fraction(columns, size if cut else 1)
        if storage is not None:
            for unit in (storage.group_size, 32 // storage.bits):
                if unit != -1 and (on_gpu / unit).denominator != 1:
                    return f"{on_gpu} columns of {part} in {unit}s"
    return None


@st.composite
def recipes_without_ranks(draw: st.DrawFn) -> tuple[str, dict[str, Any], Any, tuple[int, ...]]:
    name = draw(st.sampled_from(sorted(NEIGHBOURS)))
    config, possible = NEIGHBOURS[name]
    largest = draw(st.sampled_from(possible))
    factorize = {
        "method": draw(st.sampled_from(["erc_svd", "svd_llm"])),
        "layout": draw(LAYOUTS),
        "compression_ratio": draw(st.integers(1, 8)) / 10,
        "allocation": draw(st.sampled_from(["last_k", "uniform", "error_controlled"])),
    }
    if factorize["allocation"] == "last_k":
        counts = st.sampled_from(["auto", "all", config["num_hidden_layers"] // 2])
        factorize["num_compressed_layers"] = draw(counts)
    quantize = st.fixed_dictionaries(
        {
            "bits": st.sampled_from([4, 8]),
            "group_size": st.sampled_from([32, 64, 128, -1]),
            "sym": st.booleans(),
        }
    )
    sizes = tuple(size for size in (1, 2, 4, 8) if size <= largest)
    return name, factorize, draw(st.none() | quantize), sizes


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(drawn=recipes_without_ranks())
@example(
    drawn=(
        "hidden 40",
        {"method": "svd_llm", "layout": "pivoted", "compression_ratio": 0.8, "allocation": "uniform"},
        None,
        (1, 2, 4, 8),  # eight pivots of a [48, 40] matrix are more than a fifth of it
    )
)
def test_recipe_without_ranks_is_planned_if_its_ratio_is_possible(
    drawn: tuple[str, dict[str, Any], Any, tuple[int, ...]],
    tmp_path: Path,
    described: dict[str, Architecture],
) -> None:
    name, factorize, quantize, sizes = drawn
    (tmp_path / "config.json").write_text(json.dumps(NEIGHBOURS[name][0]))
    if name not in described:
        described[name] = architecture_of(tmp_path)
    architecture = described[name]
    stages = [{"factorize": factorize}] + ([] if quantize is None else [{"quantize": quantize}])
    recipe = Recipe.model_validate(raw_recipe(tmp_path, *stages, sizes=sizes))
    if not is_possible(factorize, architecture, sizes):
        with pytest.raises(PlanError, match=r"compression_ratio|the budget is"):
            make_plan(recipe)
        return
    make_plan(recipe)
    candidates = plan_stages(recipe, load_config(str(tmp_path)), architecture, "bfloat16")[-1].candidates
    for candidate in candidates:
        for module, description in candidate.modules.items():
            for size in sizes:
                problem = cannot_be_loaded(module, description, architecture, size)
                assert problem is None, (module, size, problem)


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
@pytest.mark.parametrize("name", ["SmolLM2-135M", "hidden 96", "hidden 256", "hidden 896"])
@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_target_is_planned_without_ranks(
    layout: str, name: str, bits: float, write_config: Callable[[Mapping[str, Any]], Path]
) -> None:
    config, sizes = NEIGHBOURS[name]
    directory = write_config(config)
    stage = {"factorize": {"method": "svd_llm", "allocation": "error_controlled", "layout": layout}}
    recipe = raw_recipe(directory, stage, INT4, sizes=sizes, target={"overall_bits": bits})
    plan = make_plan(Recipe.model_validate(recipe))
    [candidate] = plan.candidates
    [factorize] = [stage for stage in plan.stages if isinstance(stage, FactorizeStage)]
    task = factorize.allocation
    assert task is not None
    assert sum(min(costs.values()) for costs in task.costs.values()) <= task.budget
    assert candidate.num_compressed_layers == config["num_hidden_layers"]


# Bytes on a GPU


@pytest.mark.slow
def test_bytes_of_a_gpu_are_told_beside_those_of_the_dense_model(
    write_config: Callable[[Mapping[str, Any]], Path],
) -> None:
    directory = write_config(LLAMA_3_8B)
    sizes = [1, 2, 4, 8]
    plan = make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, sizes=sizes)))
    hidden, vocab, layers = 4096, 128256, 32
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    norms = 2 * hidden * layers + hidden
    candidate = plan.candidates[-1]
    for size in sizes:
        outside = 2 * vocab * hidden // size + norms
        dense = outside + layers * sum(rows * columns for rows, columns in shapes.values()) // size
        assert plan.gpu_bytes[size] == 2 * dense
        held = outside
        for layer in candidate.layers:
            for name, rank in layer.ranks.items():
                rows, columns = shapes[name]
                if rank is None:
                    held += rows * columns // size
                elif name.endswith(ROW_PARALLEL):
                    held += rank * columns // size + rows * rank
                else:
                    held += rank * columns + rows // size * rank
        assert candidate.gpu_bytes[size] == 2 * held
        assert candidate.gpu_share[size] == held / dense
    [warning] = [each for each in plan.warnings if each.startswith("serving: ")]
    for size in sizes:
        shares = [each.gpu_share[size] for each in plan.candidates]
        told = f" {size} ({min(shares):.2f} to {max(shares):.2f} times)"
        assert (told in warning) == (max(shares) > 1) == (size > 1)
    assert "serve copies of the model at tensor parallel size 1, add a quantize stage, or" in warning
    quantized = make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, INT4, sizes=sizes)))
    assert max(quantized.candidates[-1].gpu_share.values()) < 1
    assert not any(each.startswith("serving: ") for each in quantized.warnings)
    assert plan.as_json()["gpu_bytes"] == plan.gpu_bytes
    (directory / "recipe.yaml").write_text(json.dumps(raw_recipe(directory, *NATURAL, sizes=[8])))
    shown = CliRunner().invoke(app, ["plan", str(directory / "recipe.yaml")], terminal_width=200).stdout
    assert "Weights on each GPU, by tensor-parallel size" in shown
    assert f"{candidate.gpu_share[8]:.2f} x" in shown
    assert f"{plan.gpu_bytes[8] / 2**30:.2f} GiB" in shown
    assert "add a quantize stage" in shown.replace("\n", " ")


@pytest.mark.slow
def test_a_narrow_terminal_shows_a_large_model_whole(
    write_config: Callable[[Mapping[str, Any]], Path],
) -> None:
    """80 layers, sizes of twelve digits, and a column for each of three kinds of accelerators."""
    directory = write_config(QWEN2_5_72B)
    plan = make_plan(Recipe.model_validate(raw_recipe(directory, *NATURAL, INT4, sizes=[1, 2, 4])))
    kernels = dict.fromkeys(ACCELERATORS, "Marlin") | {"Hopper": "Machete", "CPU": "CPUWNA16"}
    extra = dict.fromkeys(ACCELERATORS, 10**9) | {"Hopper": 0}
    uses = tuple(replace(use, kernels=kernels, extra_bytes=extra) for use in plan.kernels)
    plan = replace(plan, kernels=uses, kernel_source="vLLM")
    printed = io.StringIO()
    Console(width=80, file=printed).print(render(plan))
    shown = printed.getvalue()[printed.getvalue().index("Ranks with k") :]
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    last = shown[shown.rindex("Ranks with k") : shown.index("outside the layers")]
    spans = [tuple(map(int, span.split("-"))) for span in re.findall(r"\n\W *(\d+(?:-\d+)?) ", last)]
    layers = [layer for span in spans for layer in range(span[0], span[-1] + 1)]
    assert layers == list(range(80))
    assert len(spans) < 20
