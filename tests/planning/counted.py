"""What stages declare to need beside what their runs are seen to take: bytes of tensors, and operations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning.measured_workload import measure_workload
from ercsvd_deploy.pipelines.planning.plan import make_plan, plan_stages
from ercsvd_deploy.pipelines.stages.contract import Needs, Stage
from ercsvd_deploy.pipelines.stages.sensitivity.stage import SensitivityStage
from ercsvd_deploy.pipelines.stages.stage_run import StageRun
from ercsvd_deploy.recipe.sections import Recipe


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that exist while it lasts, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.most: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self._storages = {key: value for key, value in self._storages.items() if value[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result


def _causal_attention_flops(queries: tuple[int, ...], keys: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Return the operations of both products, of which a causal mask leaves half."""
    return 2 * math.prod(queries) * keys[-2]


def declared(recipe: Recipe) -> dict[str, Needs]:
    """Return what every stage of a recipe declares on a CPU."""
    config = load_config(recipe.model.path)
    architecture = describe(build_meta_model(config), config)
    work = measure_workload(recipe, architecture, config, stored=4, computed=4, device=torch.device("cpu"))
    stages = plan_stages(recipe, config, architecture, "float32")
    return {each.stage.name: each.stage.needs(work, each.candidates) for each in stages}


def run_counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, float]]:
    """Run a recipe; return stage -> most bytes of tensors at once, and operations of products and solvers."""
    seen: dict[str, tuple[int, float]] = {}
    plan = make_plan(recipe, device=torch.device("cpu"))

    def counting(run: Callable[[Stage, StageRun], Any]) -> Callable[[Stage, StageRun], Any]:
        def run_and_count(stage: Stage, given: StageRun) -> Any:
            flops = FlopCounterMode(
                display=False,
                custom_mapping={
                    torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 4 * shape[-1] ** 3,
                    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _causal_attention_flops,
                },
            )
            # Hooks of the counter of operations refuse `torch.autograd.grad`.
            counter = nullcontext() if isinstance(stage, SensitivityStage) else flops
            with counter, LiveTensors() as live:
                result = run(stage, given)
            seen[stage.name] = live.most, float(flops.get_total_flops())
            return result

        return run_and_count

    for kind in {type(stage) for stage in plan.stages}:
        monkeypatch.setattr(kind, "run", counting(kind.run))
    run_recipe(recipe, device=torch.device("cpu"))
    return seen
