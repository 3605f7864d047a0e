"""What forks of `tests.vllm.engines` have imported: engines, and what our plugin of vLLM imports."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

for module in (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "ercsvd_deploy.exporters.vllm.plugin",
    "ercsvd_deploy.exporters.vllm.layers.method",
):
    import_module(module)


def _inspect(describe: Callable[[], Any]) -> Any:
    return describe()


# vLLM looks at a class of models in a process that imports everything again, lest that touches a GPU.
patch("vllm.model_executor.models.registry._run_in_subprocess", _inspect).start()
