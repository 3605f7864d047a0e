"""What forks of `tests.vllm.engines` have imported: engines, and what our plugin of vLLM imports."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform

# Two small functions of eager engines are compiled, too, by g++ in every process.
with patch.object(type(current_platform), "simple_compile_backend", "eager"):
    for module in ("vllm.v1.sample.ops.logprobs", "vllm.model_executor.layers.vocab_parallel_embedding"):
        import_module(module)
for module in (
    "vllm",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.humming",
    "vllm.model_executor.layers.quantization.inc.inc",
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.model_executor.layers.quantization.moe_wna16",
    "vllm.model_executor.layers.quantization.quark.quark",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.pool.flash_maxsim",
    "vllm.v1.worker.cpu_worker",
    "ercsvd_deploy.exporters.vllm.kernels.record",
    "ercsvd_deploy.exporters.vllm.layers.method",
    "ercsvd_deploy.exporters.vllm.layers.vocabulary",
    "ercsvd_deploy.exporters.vllm.plugin",
):
    import_module(module)


def _inspect(describe: Callable[[], Any]) -> Any:
    return describe()


# Looks for references to a few kernels in everything that is imported.
current_platform.register_triton_kernel_overrides()
patch.object(type(current_platform), "register_triton_kernel_overrides").start()
# Ranks of tests share a core: one that waits for another would take half of it, for a second each time.
patch.object(SpinCondition.__init__, "__defaults__", (0.1,)).start()
# vLLM looks at a class of models in a process that imports everything again, lest that touches a GPU.
patch("vllm.model_executor.models.registry._run_in_subprocess", _inspect).start()
# An engine that ends would search everything that is imported for garbage, twice.
patch("gc.unfreeze").start()
