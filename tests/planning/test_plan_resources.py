"""What a plan says of memory, disk and kernels, against tensors that are counted, files, and vLLM itself."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.linalg.compensation import compensated_weight
from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.errors import calibration_error, compensated_error
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning import feasibility, machine
from ercsvd_deploy.pipelines.planning import memory as working_memory
from ercsvd_deploy.pipelines.planning.feasibility import TooLittleDiskError, check_resources
from ercsvd_deploy.pipelines.planning.machine import Machine
from ercsvd_deploy.pipelines.planning.memory import Held, blocks, highest
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.planning.resources import HEAP_GAPS
from ercsvd_deploy.pipelines.stages.factorize import walk
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
from ercsvd_deploy.pipelines.stages.factorize.decompositions import forget_decompositions
from ercsvd_deploy.pipelines.state.lock import work_path
from ercsvd_deploy.quantization.grid import QuantizationSettings
from ercsvd_deploy.quantization.pairs import quantize_factors
from ercsvd_deploy.recipe.load import load_recipe
from tests.conftest import ModelDirectory

TEXT = Path(__file__).parents[2] / "examples" / "text"
MIB = 2**20
RecipeWriter = Callable[..., Path]


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that exist while it lasts, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.most: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self._storages = {key: value for key, value in self._storages.items() if value[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result


def most_alive(work: Callable[[], object]) -> int:
    live = LiveTensors()
    with live:
        work()
    return live.most


def random_gram(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows


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


def on_machine(plan: Plan, **found: int | None) -> Plan:
    here = Machine(found.get("memory_bytes"), found.get("gpu_bytes"), found.get("disk_bytes"))
    return replace(plan, estimate=replace(plan.estimate, machine=here))


@pytest.mark.parametrize("shape", [(192, 128), (128, 192), (160, 160)], ids=["tall", "wide", "square"])
def test_decomposing_holds_what_is_counted(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gram = random_gram(shape[1])
    linear = LinearShape("linear", 0, *shape)
    counted = working_memory.decomposing(linear, 64).total
    workspace = 8 * 2 * min(shape) ** 2  # LAPACK's, which no tensor shows
    seen = most_alive(lambda: decompose(weight, method="svd_llm", gram=gram, max_rank=64))
    assert seen <= counted <= 1.35 * seen + workspace


def test_measuring_holds_what_is_counted() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, gram = torch.randn(192, 128, generator=generator), random_gram(128)
    factors = Factors(torch.randn(32, 128, generator=generator), torch.randn(192, 32, generator=generator))
    seen = most_alive(lambda: calibration_error(weight, factors, gram))
    assert working_memory.measuring(LinearShape("linear", 0, 192, 128)).total == pytest.approx(seen, rel=0.25)


@pytest.mark.parametrize("shape", [(192, 128), (128, 192)], ids=["tall", "wide"])
def test_compensating_holds_what_is_counted(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    gram = random_gram(shape[1])
    seen = most_alive(lambda: compensated_weight(weight, gram, gram))
    factors = Factors(torch.zeros(32, shape[1]), torch.zeros(shape[0], 32))
    seen = max(seen, most_alive(lambda: compensated_error(weight, factors, gram, gram, gram)))
    counted = working_memory.compensating(LinearShape("linear", 0, *shape)).total
    assert seen <= counted <= 1.4 * seen


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


def test_quantizing_holds_what_is_counted() -> None:
    generator = torch.Generator().manual_seed(3)
    settings = QuantizationSettings(bits=4, group_size=32, sym=True)
    weight, gram = torch.randn(192, 256, generator=generator), random_gram(256)
    pair = torch.randn(64, 256, generator=generator), torch.randn(192, 64, generator=generator)
    seen = most_alive(
        lambda: quantize_factors(
            weight, *pair, gram, settings_a=settings, settings_b=settings, scale_dtype=torch.bfloat16
        )
    )
    counted = working_memory.quantizing([LinearShape("linear", 0, 192, 256)], {"linear": 64}).total
    assert counted == pytest.approx(seen, rel=0.35)


def test_kept_decomposition_has_the_size_it_is_said_to_have() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    made = decompose(
        weight, method="svd_llm", gram=random_gram(64), output_metric=random_gram(96), max_rank=24
    )
    assert made.projection is not None
    held = made.basis.nbytes + made.projection.nbytes + made.singular_values.nbytes
    linear = LinearShape("linear", 0, 96, 64)
    assert working_memory.decomposition(linear, 24, with_metric=True).total == held


def test_small_blocks_stay_and_large_ones_go() -> None:
    assert blocks(8 * MIB, 4) == Held(mapped=32 * MIB)
    assert blocks(8 * MIB - 1, 4, 2) == Held(heap=2 * (32 * MIB - 4))
    assert highest(Held(5, 1), Held(2, 7)) == Held(5, 7)
    assert (Held(5, 1) + Held(2, 7)).total == 15


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
    told = 8192 * sum(
        len(layer.ranks) for layer in make_plan(recipe).candidates[0].layers
    )  # findings, as JSON
    assert stage.scratch_bytes - told == pytest.approx(seen[0], rel=0.02)


def test_stages_are_those_of_the_recipe(write_recipe: RecipeWriter) -> None:
    factorize = {"factorize": {"method": "svd_llm", "compression_ratio": 0.3, "rank_multiple": 32}}
    quantize = {"quantize": {"bits": 4, "group_size": 32}}

    def stages(*given: dict[str, Any], **sections: Any) -> list[str]:
        return [each.stage for each in planned(write_recipe(*given, **sections)).estimate.stages]

    assert stages(factorize, quantize) == ["factorize", "quantize", "evaluate", "export"]
    assert stages(quantize, evaluation={}) == ["quantize", "export"]
    fisher = {"factorize": factorize["factorize"] | {"output_metric": "fisher"}}
    assert stages(fisher)[0] == "sensitivity"


def test_activations_count_in_full(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe({"quantize": {"bits": 4, "group_size": 32}}, evaluation={})
    few, many = (planned(recipe, f"calibration.num_samples={count}") for count in (10_000, 30_000))
    hidden = json.loads((Path(few.model) / "config.json").read_text())["hidden_size"]
    added = 20_000 * 48 * hidden * 4 * 2  # behind the unquantized and before the quantized layer
    grown = many.estimate.peak_host_bytes - few.estimate.peak_host_bytes
    assert grown == pytest.approx(HEAP_GAPS * added, abs=1)


def test_search_may_end_in_smaller_files(write_recipe: RecipeWriter) -> None:
    stage = {"method": "svd_llm", "compression_ratio": 0.2, "rank_multiple": 8}
    searching = planned(write_recipe({"factorize": stage})).estimate
    assert searching.least_scratch_bytes < searching.scratch_bytes
    fixed = planned(write_recipe({"factorize": stage | {"num_compressed_layers": "all"}})).estimate
    assert fixed.least_scratch_bytes == fixed.scratch_bytes


def test_little_memory_is_a_warning_and_little_disk_an_error(write_recipe: RecipeWriter) -> None:
    plan = planned(write_recipe())
    needs = plan.estimate
    assert check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes)) == []
    with pytest.raises(TooLittleDiskError, match="make room"):
        check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes // 2))
    # What an unfinished run has written is there already.
    assert plan.output is not None
    work = work_path(Path(plan.output))
    work.mkdir()
    (work / "piece").write_bytes(bytes(needs.scratch_bytes))
    assert check_resources(on_machine(plan, disk_bytes=needs.scratch_bytes // 2)) == []


def test_a_small_machine_is_a_warning_unless_strict(
    write_recipe: RecipeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feasibility, "look_around", lambda *_: Machine(100 * MIB, None, 1000))
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
    with pytest.raises(TooLittleDiskError):
        check_resources(plan)
    assert [memory] == [
        warning.removeprefix("this machine may not suffice: ")
        for warning in check_resources(
            replace(
                plan,
                estimate=replace(plan.estimate, machine=Machine(100 * MIB, None, None), shortages=(memory,)),
            )
        )
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
