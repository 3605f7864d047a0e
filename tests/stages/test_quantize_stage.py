"""The quantize stage on small models: patterns, shapes, what is written, and what it loads as."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.files.tensor_store import TensorInfo
from ercsvd_deploy.format.schema import CheckpointConfig, Storage, WeightQuantization
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.quantize.layer import LayerQuantizer, QuantizationError, naming
from ercsvd_deploy.pipelines.stages.quantize.planning.serving_notes import serving_warnings
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import (
    QuantizePlanError,
    check_num_tokens,
    check_shapes,
    plan_quantization,
    unquantized,
)
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedLayer
from ercsvd_deploy.quantization import grid
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.quantize import Quantize, QuantizeOverride, VocabularyIntegers
from tests.recipe_runs import RecipeWriter, factorize
from tests.stages.naive_factors import gram, inputs_of

pytestmark = pytest.mark.slow  # whole runs

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 4, "group_size": 32} | settings}


def test_patterns_match_names_and_their_ends() -> None:
    plan = plan_quantization(
        Quantize(
            bits=4,
            group_size=64,
            ignore=("layers.0.*",),
            overrides={
                "mlp.down_proj": QuantizeOverride(bits=8),
                "model.layers.2.*": QuantizeOverride(sym=False),
            },
        ),
        NAMES,
    )
    assert plan.integers["model.layers.0.mlp.down_proj"] is None
    assert plan.integers["model.layers.1.mlp.down_proj"] == WeightQuantization(bits=8, group_size=64)
    assert plan.integers["model.layers.2.mlp.down_proj"] == WeightQuantization(
        bits=8, group_size=64, sym=False
    )
    assert plan.integers["model.layers.1.self_attn.q_proj"] == WeightQuantization(bits=4, group_size=64)
    assert {match.pattern: len(match.modules) for match in plan.matches} == {
        "layers.0.*": 3,
        "mlp.down_proj": 3,
        "model.layers.2.*": 3,
    }


@pytest.mark.parametrize("purpose", ["ignore", "overrides"])
def test_pattern_that_matches_nothing_names_near_misses(purpose: str) -> None:
    pattern = "mlp.donw_proj"
    value: Any = (pattern,) if purpose == "ignore" else {pattern: QuantizeOverride(bits=8)}
    with pytest.raises(QuantizePlanError, match=r"mlp\.donw_proj.*near misses: mlp\.down_proj"):
        plan_quantization(Quantize(**{purpose: value}), NAMES)


def test_shapes_that_cannot_be_loaded_are_refused_with_what_works(llama: Path) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    names = [linear.name for linear in architecture.linears]
    dense: dict[str, int | None] = {}
    fitting = plan_quantization(Quantize(group_size=64), names)
    check_shapes(fitting, dense, architecture, [1, 2])  # o_proj: 128 / 2 = 64 columns on a rank
    with pytest.raises(QuantizePlanError, match=r"128 does not divide its 64 columns.*group_size -1, 32, 64"):
        check_shapes(plan_quantization(Quantize(group_size=128), names), dense, architecture, [1, 2])
    with pytest.raises(
        QuantizePlanError, match=r"o_proj at tensor parallel size 8: .* divide its 16 columns"
    ):
        check_shapes(plan_quantization(Quantize(group_size=32), names), dense, architecture, [8])
    with pytest.raises(
        QuantizePlanError, match=r"o_proj at tensor parallel size 32: its 4 .* no multiple of 8"
    ):
        check_shapes(plan_quantization(Quantize(group_size=-1), names), dense, architecture, [32])
    odd_rank = {"model.layers.3.mlp.up_proj": 96}
    check_shapes(plan_quantization(Quantize(group_size=32), names), odd_rank, architecture, [1, 2])
    with pytest.raises(QuantizePlanError, match=r"up_proj\.factor_b.*rank_multiple 64"):
        check_shapes(fitting, odd_rank, architecture, [1])
    with pytest.raises(QuantizePlanError, match=r"up_proj\.factor_b .*its 12 .*rank_multiple 8 or auto"):
        check_shapes(
            plan_quantization(Quantize(group_size=-1), names),
            {"model.layers.3.mlp.up_proj": 12},
            architecture,
            [1],
        )


def test_shapes_that_kernels_pad_or_leave_are_a_warning(llama: Path) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    names = [linear.name for linear in architecture.linears]
    plan = plan_quantization(Quantize(group_size=-1), names)

    def warnings(ranks: dict[str, int | None], sizes: list[int]) -> list[str]:
        check_shapes(plan, ranks, architecture, sizes)
        described = plan.describe(ranks, architecture)
        return serving_warnings(plan, described, architecture, sizes, "bfloat16")

    assert warnings({}, [1, 2]) == []
    [warning] = warnings({}, [1, 2, 8])
    assert "q_proj is 16 x 128 at tensor parallel size 8, say): GPU kernels pad them" in warning
    [warning] = warnings({"model.layers.3.mlp.up_proj": 48}, [1])
    assert "2 integer matrices" in warning
    assert "up_proj.factor_a is 48 x 128" in warning


def test_too_little_calibration_is_refused_and_little_warned_of(llama: Path) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    names = [linear.name for linear in architecture.linears]
    settings = Quantize(group_size=32)
    plan = plan_quantization(settings, names)
    with pytest.raises(QuantizePlanError, match="200 calibration tokens are too few"):
        check_num_tokens(plan, settings, architecture, 200)
    assert "are few for GPTQ" in check_num_tokens(plan, settings, architecture, 700)[0]
    assert check_num_tokens(plan, settings, architecture, 5000) == []
    narrow = Quantize(group_size=32, ignore=("mlp.down_proj",))
    assert check_num_tokens(plan_quantization(narrow, names), narrow, architecture, 600) == []
    assert check_num_tokens(plan, Quantize(method="rtn"), architecture, 200) == []
    head_alone = Quantize(group_size=32, ignore=("*",), lm_head=VocabularyIntegers())
    with pytest.raises(QuantizePlanError, match="too few for GPTQ; lm_head has 128 inputs"):
        check_num_tokens(plan_quantization(head_alone, names), head_alone, architecture, 100)


def test_pivots_that_cannot_be_dealt_to_the_ranks_are_refused(llama: Path) -> None:
    config = load_config(str(llama))
    architecture = describe(build_meta_model(config), config)
    plan = replace(unquantized([linear.name for linear in architecture.linears]), layout="pivoted")
    check_shapes(plan, {"model.layers.3.mlp.up_proj": 24}, architecture, [1, 2, 4, 8])
    check_shapes(plan, {"model.layers.3.mlp.down_proj": 25}, architecture, [1, 2])  # inputs are cut
    with pytest.raises(QuantizePlanError, match=r"up_proj at tensor parallel size 4: its 26 pivots lie in 2"):
        check_shapes(plan, {"model.layers.3.mlp.up_proj": 26}, architecture, [1, 2, 4])


@pytest.mark.parametrize("layout", ["low_rank", "pivoted", "dense"])
def test_whole_decoder_is_stored_as_integers(layout: str, write_recipe: RecipeWriter, llama: Path) -> None:
    stages = [factorize(num_compressed_layers=3, rank_multiple="auto", layout=layout)]
    stages = [] if layout == "dense" else stages
    report, directory = run_recipe(load_recipe(write_recipe(*stages, quantize(ignore=["0.mlp.down_proj"]))))
    config = CheckpointConfig.read(json.loads((directory / "config.json").read_text())["quantization_config"])
    architecture_names = {f"model.layers.{layer}." for layer in range(4)}
    assert len(config.modules) == 4 * 7 - 1
    assert "model.layers.0.mlp.down_proj" not in config.modules
    assert {f"model.layers.{name.split('.')[2]}." for name in config.modules} == architecture_names
    assert {description.layout for description in config.modules.values()} == {"dense", layout}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert report.results["quantize"] is not None
    assert len(report.results["quantize"].matrices) == sum(len(d.parts) for d in config.modules.values())
    # The report's perplexity, streamed, is that of the model as transformers loads it.
    from ercsvd_deploy.data.texts import load_tokenizer
    from ercsvd_deploy.pipelines.inputs.texts import evaluation_windows

    tokens, _ = evaluation_windows(
        load_recipe(write_recipe(*stages, quantize())), load_tokenizer(str(llama)), 256
    )
    with torch.no_grad():
        loss = model(input_ids=tokens["held_out"], labels=tokens["held_out"]).loss
    assert report.compressed.perplexity["held_out"] == pytest.approx(float(loss.exp()), rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        ({"compression_ratio": 0.95, "num_compressed_layers": "all"}, None),
        ({"compression_ratio": 0.95, "num_compressed_layers": "all", "layout": "pivoted"}, None),
        ({"compression_ratio": 0.95, "allocation": "error_controlled"}, None),
        ({"compression_ratio": None, "allocation": "error_controlled"}, {"overall_bits": 0.45}),
    ],
)
def test_ranks_below_a_word_of_integers_stay_plain(
    stage: dict[str, Any], target: dict[str, Any] | None, write_recipe: RecipeWriter
) -> None:
    """A ratio that no group of 32 can be afforded at: ranks down to a few, and the file still loads."""
    stages = (factorize(rank_multiple="auto", **stage), quantize())
    path = write_recipe(*stages, target=target, serving={"tensor_parallel_sizes": [1, 2]})
    planned = make_plan(load_recipe(path))
    if target is None:
        assert any(
            "stay plain: columns on a GPU, or the rank, are" in warning for warning in planned.warnings
        )
    report, directory = run_recipe(load_recipe(path))
    config = CheckpointConfig.read(json.loads((directory / "config.json").read_text())["quantization_config"])
    ranks = {each.rank for each in config.modules.values()}
    assert min(rank for rank in ranks if rank is not None) < 8
    for description in config.modules.values():
        for (_, columns), storage in description.parts.values():
            assert storage is None or columns % 8 == 0
        is_plain = {storage is None for _, storage in description.parts.values()}
        assert is_plain == {description.rank is not None and description.rank % 8 > 0}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()
    if target is None and stage.get("allocation") is None:
        assert planned.candidates[-1].num_bytes == report.compressed.num_bytes
    else:
        assert report.compressed.num_bytes < 0.9 * planned.num_bytes


def test_int8_is_closer_to_the_original_than_int4(write_recipe: RecipeWriter) -> None:
    losses = {}
    for bits in (4, 8):
        report, _ = run_recipe(load_recipe(write_recipe(quantize(bits=bits))))
        assert report.results["quantize"] is not None
        losses[bits] = sum(linear.loss for linear in report.results["quantize"].linears)
    assert losses[8] < losses[4] / 20


def test_rounding_baseline_loses_to_gptq(write_recipe: RecipeWriter) -> None:
    losses = {}
    for method in ("gptq", "rtn"):
        stages = (factorize(num_compressed_layers=3, rank_multiple=32), quantize(method=method))
        report, _ = run_recipe(load_recipe(write_recipe(*stages)))
        assert report.results["quantize"] is not None
        taken = Counter(matrix.method for matrix in report.results["quantize"].matrices)
        # On held-out tokens rounding wins here and there: 576 tokens are few for GPTQ.
        assert taken[method] > 0.8 * taken.total() if method == "gptq" else set(taken) == {"rtn"}
        losses[method] = sum(linear.loss for linear in report.results["quantize"].linears)
    assert losses["gptq"] < losses["rtn"]


def test_switches_change_the_result(write_recipe: RecipeWriter) -> None:
    """The two switches of the error-aware order do what they say: each alters the written integers."""
    written = {}
    for name, changes in {
        "default": {},
        "original inputs": {"compressed_prefix_inputs": False},
        "no refit": {"refit_second_factor": False},
    }.items():
        stages = (factorize(num_compressed_layers=3, rank_multiple=32), quantize(**changes))
        _, directory = run_recipe(load_recipe(write_recipe(*stages)))
        written[name] = (directory / "model.safetensors").read_bytes()
    assert len(set(written.values())) == 3


def test_inputs_that_one_direction_rules_are_named(write_recipe: RecipeWriter, llama: Path) -> None:
    """The share is that of the largest eigenvalue; those above a half are in a table of the report."""
    recipe = write_recipe(quantize(bits=8))
    report, _ = run_recipe(load_recipe(recipe))
    outcome = report.results["quantize"]
    assert outcome is not None
    shares = {linear.name: linear.leading_share for linear in outcome.linears}
    first = [name for name in shares if ".0." in name]  # before anything is quantized
    for name, inputs in inputs_of(llama, recipe, first[:1]).items():
        values = torch.linalg.eigvalsh(gram(inputs))
        assert shares[name] == pytest.approx(float(values[-1] / values.sum()), rel=0.05)
    ruled = {name for name, share in shares.items() if (share or 0) > 0.5}
    named = [table for table in report.tables if table.title == "Inputs that one direction rules"]
    assert {row[0] for table in named for row in table.rows} == ruled


def test_groups_that_fit_other_ranks_are_another_result(write_recipe: RecipeWriter) -> None:
    """Groups are made to fit tensor parallel sizes: an export for other sizes is made again."""
    settings = []
    for sizes in ([1], [1, 2]):
        planned = make_plan(load_recipe(write_recipe(quantize(), serving={"tensor_parallel_sizes": sizes})))
        settings += [stage.settings() for stage in planned.stages if stage.name == "quantize"]
    assert settings[0] != settings[1]
    assert settings[0]["bits"] == settings[1]["bits"] == 4


@pytest.mark.parametrize(
    ("constant", "output_metric", "counts"),
    [
        ("sensitivity.stage.NUM_FISHER_SAMPLES", "fisher", True),
        ("sensitivity.stage.NUM_FISHER_SAMPLES", "identity", False),
        ("quantize.stage.FEWEST_SAMPLES_TO_HOLD_OUT", "identity", True),
    ],
)
def test_other_numbers_of_samples_are_another_result(
    constant: str,
    output_metric: str,
    counts: bool,
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe(write_recipe(quantize(correction={"rank": 8}, output_metric=output_metric)))
    before = [stage.settings() for stage in make_plan(recipe).stages if stage.name == "quantize"]
    monkeypatch.setattr(f"ercsvd_deploy.pipelines.stages.{constant}", 7)
    after = [stage.settings() for stage in make_plan(recipe).stages if stage.name == "quantize"]
    assert (before != after) is counts


def test_of_linears_that_share_inputs_the_one_at_fault_is_named() -> None:
    group, own = LinearShape("q_proj", 0, 8, 8), LinearShape("v_proj", 0, 8, 8)
    with pytest.raises(QuantizationError, match=r"^v_proj: too large$"), naming(group), naming(own):
        raise ValueError("too large")


@pytest.mark.parametrize(
    ("fault", "message"), [(torch.nan, "the weight has NaN"), (1e9, "does not fit float16")], ids=str
)
def test_of_linears_corrected_together_the_one_at_fault_is_named_without_a_search(
    fault: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Mock()
    monkeypatch.setattr(grid, "_search_spans", search)
    storage = Storage.corrected((8, 8), WeightQuantization(bits=4, group_size=8), 2)
    linears = [
        (LinearShape(name, 0, 8, 8), storage, nn.Linear(8, 8, bias=False)) for name in ("q_proj", "v_proj")
    ]
    linears[1][2].weight.data[3, 5] = fault
    original = Mock(info=lambda _name: TensorInfo((8, 8), "F16", 128))
    quantizer = LayerQuantizer(
        Quantize(bits=4, group_size=-1), original, {}, False, torch.device("cpu"), torch.float32
    )
    with pytest.raises(QuantizationError, match=f"^v_proj: .*{message}"):
        quantizer._quantize_corrected(Mock(), linears, torch.eye(8), None, QuantizedLayer())
    assert not search.called
