"""Memory that runs out: which stage it was, of what, and what takes less; libraries word it in many ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ercsvd_deploy.pipelines.stages.judge import JudgeStage
from ercsvd_deploy.pipelines.stages.quantize.stage import QuantizeStage
from ercsvd_deploy.pipelines.state.memory_errors import exhausted_memory
from tests.recipe_runs import RecipeWriter, factorize, invoke

pytestmark = pytest.mark.slow  # whole runs

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB "
    "is free. Including non-PyTorch memory, this process has 77 GiB memory in use."
)


def on_the_host() -> None:
    torch.empty(2**50)  # what torch really says


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


ERRORS: dict[str, tuple[Callable[[], None], str]] = {
    "torch's class": (failing(torch.OutOfMemoryError(CUDA)), "GPU memory"),
    "a plain error": (failing(RuntimeError(CUDA)), "GPU memory"),
    "cuBLAS": (
        failing(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ...")),
        "GPU memory",
    ),
    "driver": (failing(RuntimeError("CUDA driver error: out of memory")), "GPU memory"),
    "cuSOLVER": (failing(RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED")), "GPU memory"),
    "the host": (on_the_host, "memory"),
    "Python": (failing(MemoryError()), "memory"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    ("stage", "remedy"),
    [
        (QuantizeStage, "gptq, 4 bits ran out of {} ({}): lower calibration.num_samples or calibration."),
        (JudgeStage, "judge ran out of {} ({}): lower evaluation.max_sequences or evaluation."),
    ],
)
def test_the_message_names_stage_and_remedy(
    kind: str,
    stage: type[QuantizeStage | JudgeStage],
    remedy: str,
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail, memory = ERRORS[kind]
    monkeypatch.setattr(stage, "run", lambda *_arguments: fail())
    recipe = write_recipe(factorize(rank_multiple="auto"), {"quantize": {"bits": 4, "group_size": 32}})
    code, _, error = invoke("run", recipe)
    assert code == 1
    before, _, after = remedy.partition("({})")
    assert before.format(memory).strip() in error
    assert after.removeprefix(": ") in error
    assert ("or use --device cpu" in error) == (memory == "GPU memory")
    assert "the same command goes on from there" in error
    assert "Including non-PyTorch memory" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "error", [ValueError("memory of an elephant"), RuntimeError("shapes"), OSError(28, "full")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert exhausted_memory(error) is None
