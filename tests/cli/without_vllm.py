"""`python -m tests.cli.without_vllm ARGUMENT...`: `ercsvd` where vLLM is not installed."""

from __future__ import annotations

import sys

from ercsvd_deploy.pipelines.cli.entry_point import main

sys.modules["vllm"] = None  # type: ignore[assignment]
main()
