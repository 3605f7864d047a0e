"""What a plan says of memory, disk and kernels, against tensors that are counted, files, and vLLM itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning import feasibility, machine
from ercsvd_deploy.pipelines.planning.feasibility import TooLittleDiskError, check_resources
from ercsvd_deploy.pipelines.planning.machine import Machine
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.stages.factorize import walk
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import forget_decompositions
from ercsvd_deploy.pipelines.state.lock import work_path
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import load_recipe
from tests.conftest import ModelDirectory
from tests.planning.counted import declared, run_counted
from tests.tiny_models import save_tiny_model

TEXT = Path(__file__).parents[2] / "examples" / "text"
MIB = 2**20
RecipeWriter = Callable[..., Path]


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: ModelDirectory) -> RecipeWriter:
    def write(*stages: dict[str, Any], **sections: Any) -> Path:
        recipe = {
            "model": {"path": str(tiny_model("llama"))},
            "calibration": {
                "dataset": {"text": str(TEXT / "calibration.txt")},
                "num_samples": 64,
                "sequence_length": 48,
            },
            "stages": list(stages)
            or [{"factorize": {"method": "svd_llm", "compression_ratio": 0.3, "rank_multiple": 8}}],
            "evaluation": {"perplexity": {"held_out": str(TEXT / "in_domain.txt")}, "max_sequences": 4},
            "export": {"path": str(tmp_path / "out")},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | sections))
        return path

    return write


def planned(recipe: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_samples": 4}, r"192 calibration tokens are too few for GPTQ; .*down_proj has 256 in"),
        ({"sequence_length": 100000}, r"calibration.sequence_length is 100000, but the model has 256 pos"),
        (None, r"evaluation.sequence_length is 1000, but the model has 256 positions: lower it"),
    ],
)
def test_a_plan_refuses_what_no_text_can_mend(
    overrides: dict[str, int] | None, expected: str, write_recipe: RecipeWriter
) -> None:
    recipe = write_recipe({"quantize": {"group_size": 32}})
    assert planned(recipe).candidates
    lines = [f"calibration.{key}={value}" for key, value in (overrides or {}).items()]
    with pytest.raises(PlanError, match=expected):
        planned(recipe, *(lines or ["evaluation.sequence_length=1000"]))


def on_machine(plan: Plan, **found: int | None) -> Plan:
    here = Machine(found.get("memory_bytes"), found.get("gpu_bytes"), found.get("disk_bytes"))
    return replace(plan, estimate=replace(plan.estimate, machine=here))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose batches pass one after the other, as a large one's do: a side is above 1024."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1056,
        "vocab_size": 4096,
        "num_attention_heads": 4,
    }
    return save_tiny_model(tmp_path_factory.mktemp("wide"), "llama", **sizes)


ERC_SVD = {"method": "erc_svd", "compression_ratio": 0.3, "rank_multiple": 32}
FISHER = {
    "method": "svd_llm",
    "output_metric": "fisher",
    "num_fisher_samples": 8,
    "allocation": "error_controlled",
}
GPTQ = {"quantize": {"bits": 4, "group_size": 32}}
ONE_DAMPING = {"quantize": {"bits": 4, "group_size": 32, "damping": 0.01}}  # one pass of GPTQ a matrix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "sections"),
    [
        ([{"factorize": ERC_SVD | {"num_search_samples": 8}}, {"recover": {"steps": 8}}, GPTQ], {}),
        ([{"factorize": ERC_SVD | {"beta": "auto", "compressed_prefix_inputs": True}}], {}),
        # So little that every kind of Linear gets a rank: writing factors takes what the widest does.
        ([{"factorize": FISHER}, GPTQ], {"target": {"overall_bits": 2.5}}),
        ([ONE_DAMPING, {"recover": {"steps": 8, "lookahead": 1}}], {}),
        ([ONE_DAMPING, {"recover": {"steps": 2, "end_to_end_steps": 2}}], {}),
    ],
    ids=["search, recover, gptq", "two trajectories", "error control", "gptq, recover", "end to end"],
)
def test_stages_take_what_they_declare(
    stages: list[dict[str, Any]],
    sections: dict[str, Any],
    wide_model: Path,
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = {"text": str(TEXT / "calibration.txt")}
    calibration = {"dataset": dataset, "num_samples": 80, "sequence_length": 128}
    evaluation = {"perplexity": {"held_out": str(TEXT / "in_domain.txt")}, "max_sequences": 16}
    recipe = load_recipe(
        write_recipe(
            *stages,
            model={"path": str(wide_model)},
            calibration=calibration,
            evaluation=evaluation,
            **sections,
        )
    )
    needs, seen = declared(recipe), run_counted(recipe, monkeypatch)
    assert needs.keys() == seen.keys()
    for name, (most, flops) in seen.items():
        if name == "export":  # also counts the pages of the files that it reads, which no tensor shows
            assert most <= needs[name].beside_bytes <= 2.5 * most
            continue
        assert needs[name].working_bytes == pytest.approx(most, rel=0.25), name
        if flops:
            assert needs[name].flops <= flops, name
            assert needs[name].flops >= 0.3 * flops, name


@pytest.mark.parametrize("allocation", ["uniform", "error_controlled"])
def test_held_out_samples_and_second_trajectories_cost_memory(
    allocation: str, write_recipe: RecipeWriter
) -> None:
    stage = {
        "method": "erc_svd",
        "compression_ratio": 0.3,
        "rank_multiple": 8,
        "allocation": allocation,
        "output_metric": "fisher",
    }
    fixed = planned(write_recipe({"factorize": stage})).estimate
    for option in ({"beta": "auto"}, {"compressed_prefix_inputs": True}):
        dearer = planned(write_recipe({"factorize": stage | option})).estimate
        assert dearer.peak_host_bytes >= fixed.peak_host_bytes


def test_work_directory_grows_as_planned(write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(
        write_recipe(
            {
                "factorize": {
                    "method": "svd_llm",
                    "compression_ratio": 0.3,
                    "rank_multiple": 8,
                    "num_compressed_layers": "all",
                }
            }
        )
    )
    assert recipe.export.path is not None
    seen: list[int] = []
    forget = forget_decompositions

    def look_and_forget(work: Factorization) -> None:
        assert recipe.export.path is not None
        files = work_path(recipe.export.path.absolute()).rglob("*.safetensors")
        headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files]
        files = work_path(recipe.export.path.absolute()).rglob("*.safetensors")
        seen.append(sum(path.stat().st_size for path in files) - sum(headers))
        forget(work)

    monkeypatch.setattr(walk, "forget_decompositions", look_and_forget)
    run_recipe(recipe, device=torch.device("cpu"))
    stage = next(
        each
        for each in make_plan(recipe, device=torch.device("cpu")).estimate.stages
        if each.stage == "factorize"
    )
    told = 8192 * sum(len(layer.ranks) for layer in make_plan(recipe).candidates[0].layers)  # entry, as JSON
    assert stage.scratch_bytes - told == pytest.approx(seen[0], rel=0.02)


def test_stages_are_those_of_the_recipe(write_recipe: RecipeWriter) -> None:
    factorize = {"factorize": {"method": "svd_llm", "compression_ratio": 0.3, "rank_multiple": 32}}
    quantize = {"quantize": {"bits": 4, "group_size": 32}}

    def stages(*given: dict[str, Any], **sections: Any) -> list[str]:
        return [each.stage for each in planned(write_recipe(*given, **sections)).estimate.stages]

    assert stages(factorize, quantize) == ["judge_original", "factorize", "quantize", "judge", "export"]
    assert stages(quantize, evaluation={}) == ["quantize", "export"]
    fisher = {"factorize": factorize["factorize"] | {"output_metric": "fisher"}}
    assert stages(fisher)[:2] == ["judge_original", "sensitivity"]


def test_activations_count_in_full(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe({"quantize": {"bits": 4, "group_size": 32}}, evaluation={})
    few, many = (
        make_plan(
            load_recipe(recipe, [f"calibration.num_samples={count}"]), device=torch.device("cuda")
        ).estimate
        for count in (10_000, 30_000)
    )
    hidden = json.loads((Path(load_recipe(recipe).model.path) / "config.json").read_text())["hidden_size"]
    added = 20_000 * 48 * hidden * 4 * 2  # behind the unquantized and before the quantized layer
    assert many.peak_device_bytes - few.peak_device_bytes == added


def test_search_may_end_in_smaller_files(write_recipe: RecipeWriter) -> None:
    stage = {"method": "svd_llm", "compression_ratio": 0.2, "rank_multiple": 8}
    searching = planned(write_recipe({"factorize": stage})).estimate
    assert searching.least_scratch_bytes < searching.scratch_bytes
    fixed = planned(write_recipe({"factorize": stage | {"num_compressed_layers": "all"}})).estimate
    assert fixed.least_scratch_bytes == fixed.scratch_bytes


def test_little_memory_is_a_warning_and_little_disk_an_error(write_recipe: RecipeWriter) -> None:
    plan = planned(write_recipe())
    needs = plan.estimate
    assert plan.output is not None
    output = Path(plan.output)
    assert check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes).estimate, output) == []
    with pytest.raises(TooLittleDiskError, match="make room"):
        check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes // 2).estimate, output)
    # What an unfinished run has written is there already.
    work = work_path(output)
    work.mkdir()
    (work / "piece").write_bytes(bytes(needs.scratch_bytes))
    assert check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes // 2).estimate, output) == []


@pytest.mark.slow
def test_a_small_machine_is_a_warning_unless_strict(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feasibility, "inspect_machine", lambda *_: Machine(100 * MIB, None, 1000))
    result = CliRunner().invoke(app, ["plan", str(write_recipe()), "--json"])
    assert result.exit_code == 0
    memory, disk = json.loads(result.stdout)["estimate"]["shortages"]
    assert "100 MiB are available: lower" in memory
    assert "make room" in disk
    assert "warning: this machine may not suffice: " in result.stderr
    strict = CliRunner().invoke(app, ["plan", str(write_recipe()), "--json", "--strict-machine"])
    assert strict.exit_code == 1
    assert "error: this machine may not suffice: " in strict.stderr
    plan = planned(write_recipe())
    assert plan.output is not None
    output = Path(plan.output)
    with pytest.raises(TooLittleDiskError):
        check_resources(plan.estimate, output)
    small = replace(plan.estimate, machine=Machine(100 * MIB, None, None), shortages=(memory,))
    assert [memory] == [
        warning.removeprefix("this machine may not suffice: ") for warning in check_resources(small, output)
    ]


def test_output_inside_the_source_is_a_problem(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    source = load_recipe(recipe).model.path
    [problem] = planned(recipe, f"export.path={source}/out").estimate.problems
    assert "inside the source model" in problem


def test_unknown_sizes_are_assumed_and_said(write_recipe: RecipeWriter) -> None:
    whole = planned(write_recipe(evaluation={"perplexity": {"held_out": str(TEXT / "in_domain.txt")}}))
    size = (TEXT / "in_domain.txt").stat().st_size
    assert whole.estimate.assumptions == (f"held_out has about {size // 4:,} tokens (its bytes by 4)",)
    assert planned(write_recipe()).estimate.assumptions == ()


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(f"{600 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{500 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {200 * MIB}\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_memory() == 300 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = machine.available_memory()
    assert unlimited is not None
    assert unlimited != 300 * MIB


def test_projections_with_one_input_are_one_matrix(write_recipe: RecipeWriter) -> None:
    plan = planned(
        write_recipe(
            {
                "factorize": {
                    "method": "svd_llm",
                    "compression_ratio": 0.3,
                    "rank_multiple": 32,
                    "num_compressed_layers": "all",
                }
            },
            {"quantize": {"bits": 4, "group_size": 32}},
            serving={"tensor_parallel_sizes": [1, 2]},
        )
    )
    ranks = plan.candidates[-1].layers[-1].ranks
    for size in (1, 2):
        uses = {use.matrices: use for use in plan.kernels if use.tensor_parallel_size == size}
        names = tuple(
            name if ranks[name] is None else f"{name}.factor_a" for name in ("mlp.gate_proj", "mlp.up_proj")
        )
        if all(ranks[name] is not None for name in ("mlp.gate_proj", "mlp.up_proj")):
            assert uses[names].rows == sum(ranks[name] or 0 for name in ("mlp.gate_proj", "mlp.up_proj"))
