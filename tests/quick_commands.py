"""What forks of `tests.recipe_runs.start` have imported: a run, without what its tests do not look at."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

from ercsvd_deploy.pipelines.reporting.html import plots
from ercsvd_deploy.pipelines.state.code_version import code_version

STAGES = [f"ercsvd_deploy.pipelines.stages.{name}.stage" for name in ("factorize", "quantize")] + [
    f"ercsvd_deploy.pipelines.stages.{name}" for name in ("judge", "export")
]
for module in (
    "typer",
    "torch",
    "datasets",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "ercsvd_deploy.pipelines.flow",
    *STAGES,
):
    import_module(module)
for module in STAGES:
    code_version(module)  # reads the code of the whole package, once

# As in `tests/conftest.py`: no pictures, and no test cuts the power.
patch.object(plots, "draw_plots", return_value=[]).start()
patch("os.fsync").start()
