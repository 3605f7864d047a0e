"""A fixture for tests that build single layers of vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def vllm_in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give vLLM's layers the distributed state and the configuration that they read when created."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    store = tmp_path_factory.mktemp("distributed") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, store.as_uri(), 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()
