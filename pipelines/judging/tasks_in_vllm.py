"""lm-eval's tasks on a model as vLLM serves it, in a process of its own: `python -m MODULE REQUEST ANSWER`.

vLLM keeps memory and processes until its own process ends. REQUEST is a JSON file {"directory": the model's,
"settings": how tasks are run, "engine": further keyword arguments of `vllm.LLM`}, ANSWER receives the
results.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ercsvd_deploy.exporters.vllm.engines.machine import find_machine, weight_bytes
from ercsvd_deploy.exporters.vllm.engines.process import ask_engine
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.pipelines.judging.parity.measure import give_back_memory
from ercsvd_deploy.pipelines.judging.tasks import TaskResults, TaskSettings, run_tasks_on

_SETTINGS = TypeAdapter(TaskSettings)
_RESULTS = TypeAdapter(TaskResults)
_LONGEST = 8192  # tokens of a document with its examples; vLLM reserves memory for this length
_TIMEOUT = 24 * 3600.0  # seconds; whole suites of tasks take hours


def run_tasks_in_vllm(
    directory: Path, settings: TaskSettings, size: int, log: Path, *, eager: bool = False
) -> TaskResults:
    """Return lm-eval's results of a model that vLLM serves; a failing task does not stop the others.

    Args:
        directory: The model, compressed or not.
        settings: How tasks are run.
        size: Tensor-parallel size.
        log: File to which everything that vLLM prints is added.
        eager: Whether vLLM leaves out compilation and CUDA graphs.

    Raises:
        NotServableHereError: other work occupies the GPUs.
        EngineError: vLLM did not run; the log says why.
    """
    give_back_memory()
    machine = find_machine()
    request = {
        "directory": str(directory),
        "settings": _SETTINGS.dump_python(settings, mode="json"),
        "engine": machine.engine_arguments(size, weight_bytes(directory)) | {"enforce_eager": eager},
    }
    answer = ask_engine(
        __name__, request, environment=machine.environment(size, os.environ), log=log, timeout=_TIMEOUT
    )
    return _RESULTS.validate_python(answer)


def _open(directory: str, settings: TaskSettings, engine: dict[str, Any]) -> Any:
    """Return lm-eval's wrapper of a model that vLLM serves."""
    wrapper = _import_wrapper()
    config = load_config(directory, trust_remote_code=settings.trust_remote_code)
    return wrapper(
        pretrained=directory,
        trust_remote_code=settings.trust_remote_code,
        max_model_len=min(_LONGEST, getattr(config, "max_position_embeddings", _LONGEST)),
        **engine,
    )


def _import_wrapper() -> Any:
    """Import lm-eval's vLLM class, which reads the version of a package `vllm` even on a CPU build."""
    from ercsvd_deploy.exporters.vllm.compatibility import current_platform, installed_version

    assert current_platform.device_type  # detected now, while package names are still unpatched
    version, vllm_version = metadata.version, installed_version()

    def version_of(distribution_name: str) -> str:
        return vllm_version if distribution_name == "vllm" else version(distribution_name)

    metadata.version = version_of
    try:
        from lm_eval.models.vllm_causallms import VLLM  # binds `metadata.version` at import
    finally:
        metadata.version = version
    return VLLM


def main() -> None:
    """Answer one request."""
    request, answer = (Path(argument) for argument in sys.argv[1:3])
    request_values = json.loads(request.read_text(encoding="utf-8"))
    settings = _SETTINGS.validate_python(request_values["settings"])
    results = run_tasks_on(_open(request_values["directory"], settings, request_values["engine"]), settings)
    answer.write_text(_RESULTS.dump_json(results).decode(), encoding="utf-8")
    os._exit(0)  # vLLM's exit handlers wait for processes that are gone already


if __name__ == "__main__":
    main()
