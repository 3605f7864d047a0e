"""Is what `ercsvd plan` says about memory and disk true? Plan and measure three models, and compare.

    .venv/bin/python benchmarks/plan_accuracy.py

Each recipe is planned, then run in a process of its own that notes, stage by stage, the kernel's counter of
the highest resident memory (VmHWM, reset at the start of every stage); meanwhile this process watches the
size of the work directory. Writes `benchmarks/results/plan_accuracy.json` and `.md`; ends with an error if a
whole run's memory, scratch or bytes are more than 25 % off, or if it is faster than the bound on its time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import environment, markdown_table, write_results
from streaming_memory import read_status

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples/tiny-llama"
TEXTS = ROOT / "examples/text"
_INTERVAL_S = 0.02
_TOLERANCE = 0.25
_STAGE_OF_TITLE = {
    "gptq": "quantize",
    "rtn": "quantize",
    "judge": "judge",
    "judge original": "judge_original",
}


@dataclass(frozen=True)
class Case:
    """A model and what is done to it."""

    name: str
    shape: dict[str, Any] | None  # of a random Llama; None: the embedded model
    settings: dict[str, Any]  # sections of the recipe


def _calibration(samples: int, length: int) -> dict[str, Any]:
    dataset = {"text": str(TEXTS / "calibration.txt")}
    return {"dataset": dataset, "num_samples": samples, "sequence_length": length, "seed": 3}


def _evaluation(length: int, windows: int) -> dict[str, Any]:
    texts = {"in_domain": str(TEXTS / "in_domain.txt"), "out_of_domain": str(TEXTS / "out_of_domain.txt")}
    return {"perplexity": texts, "sequence_length": length, "max_sequences": windows}


CASES = (
    Case(
        "tiny-llama: ERC-SVD with search over k, GPTQ-4",
        None,
        {
            "calibration": _calibration(128, 256),
            "stages": [
                {
                    "factorize": {
                        "method": "erc_svd",
                        "compression_ratio": 0.2,
                        "num_compressed_layers": "auto",
                        "rank_multiple": "auto",
                    }
                },
                {"quantize": {"bits": 4, "group_size": 32}},
            ],
            "evaluation": _evaluation(256, 64),
        },
    ),
    Case(
        "random, hidden 1024: ERC-SVD of 4 of 5 layers, GPTQ-4",
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 5,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 16384,
        },
        {
            "calibration": _calibration(32, 256),
            "stages": [
                {
                    "factorize": {
                        "method": "erc_svd",
                        "compression_ratio": 0.3,
                        "num_compressed_layers": 4,
                        "num_search_samples": 8,
                        "rank_multiple": "auto",
                    }
                },
                {"quantize": {"bits": 4, "group_size": 64}},
            ],
            "evaluation": _evaluation(256, 8),
            "export": {"max_shard_size": "100MB"},
        },
    ),
    Case(
        "random, hidden 768: SVD-LLM of 6 of 12 layers, pivoted, 16 bits",
        {
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 16384,
        },
        {
            "calibration": _calibration(48, 256),
            "stages": [
                {
                    "factorize": {
                        "method": "svd_llm",
                        "compression_ratio": 0.2,
                        "num_compressed_layers": 6,
                        "layout": "pivoted",
                    }
                }
            ],
            "evaluation": _evaluation(256, 24),
        },
    ),
)


@dataclass(frozen=True)
class Figures:
    """Bytes of a run, planned or measured, and seconds."""

    memory: int
    scratch: int
    tensors: int  # bytes of the export's tensors
    memory_of_stage: dict[str, int]
    seconds: float  # planned: at least


def run_and_measure(recipe: Path, threads: int) -> None:
    """Be the measured process; print the highest memory of every stage as the last line."""
    import torch

    from ercsvd_deploy.pipelines.flow import run_recipe
    from ercsvd_deploy.recipe.load import load_recipe

    torch.set_num_threads(threads)
    peaks: dict[str, int] = {}
    current = "prepare"

    def begin(name: str) -> None:
        nonlocal current
        peaks[current] = max(peaks.get(current, 0), read_status()["VmHWM"])
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        current = name

    @contextmanager
    def progress(title: str, _steps: int) -> Iterator[Callable[[], None]]:
        begin(_STAGE_OF_TITLE.get(title.partition(",")[0], "factorize"))
        yield lambda: None
        begin("between")

    report, _ = run_recipe(load_recipe(recipe), device=torch.device("cpu"), progress=progress)
    begin("end")
    peaks["export"] = peaks.pop("between")  # what follows a stage is short, but for the export after the last
    print(json.dumps({"peaks": peaks, "seconds": report.seconds, "bytes": report.compressed.num_bytes}))


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory that is being written to."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def measure(recipe: Path, output: Path, threads: int) -> Figures:
    """Run a recipe in a process of its own and watch its work directory."""
    command = [sys.executable, __file__, "--run", str(recipe), "--threads", str(threads)]
    scratch = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            scratch = max(scratch, directory_bytes(output.with_name(f".{output.name}.work")))
            time.sleep(_INTERVAL_S)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"the measured run ended with status {process.returncode}")
    found = json.loads(lines[-1])
    return Figures(
        max(found["peaks"].values()), scratch, found["bytes"], found["peaks"], sum(found["seconds"].values())
    )


def plan(recipe: Path, threads: int) -> Figures:
    """Ask `ercsvd plan` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "ercsvd_deploy",
        "plan",
        str(recipe),
        "--json",
        "--device",
        "cpu",
    ]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=surroundings)
    found = json.loads(answer.stdout)
    needs = found["estimate"]
    return Figures(
        needs["peak_host_bytes"],
        needs["scratch_bytes"],
        found["candidates"][-1]["num_bytes"],
        {stage["stage"]: stage["host_bytes"] for stage in needs["stages"]},
        needs["least_seconds"],
    )


def compare(case: Case, threads: int) -> tuple[int, Figures, Figures]:
    """Return the model's bytes, and what was planned and measured."""
    from random_llama import write_dense

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = TINY
        if case.shape is not None:
            model = directory / "model"
            model.mkdir()
            write_dense(model, **case.shape, max_position_embeddings=1024)
            for path in TINY.glob("tokenizer*"):
                shutil.copy(path, model)
        output = directory / "out"
        export = case.settings.get("export", {}) | {"path": str(output)}
        recipe = directory / "recipe.json"  # JSON is YAML
        recipe.write_text(json.dumps({"model": {"path": str(model)}, **case.settings, "export": export}))
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        return num_bytes, plan(recipe, threads), measure(recipe, output, threads)


def _off(planned: float, measured: float) -> float:
    return planned / measured - 1


def _row(name: str, planned: float, measured: float, *, unit: float = 2**20) -> list[str]:
    off = _off(planned, measured)
    return [name, f"{planned / unit:,.1f}", f"{measured / unit:,.1f}", f"{100 * off:+.1f} %"]


def render(found: list[tuple[Case, int, Figures, Figures]]) -> str:
    """Return the Markdown text."""
    parts = [
        "# Is the plan true?\n\n`ercsvd plan` against a run, MiB. Memory is resident memory at its highest "
        "(VmHWM), libraries included; work directory the size of its files at its highest. The bold rows "
        f"must be within {100 * _TOLERANCE:.0f} %. Seconds are a lower bound: "
        "floating-point operations at the peak that a matrix product reaches.\n\nWhat moves memory away "
        "from the plan: glibc keeps freed blocks below 32 MiB, which most tensors of models this small are "
        "and few of a large one's. So a stage may have more than it needs: what stages before it have freed."
    ]
    for case, num_bytes, planned, measured in found:
        rows = [
            _row("**memory**", planned.memory, measured.memory),
            _row("**work directory**", planned.scratch, measured.scratch),
            _row("**bytes of tensors**", planned.tensors, measured.tensors),
        ]
        for stage, memory in planned.memory_of_stage.items():
            rows.append(_row(f"memory, {stage}", memory, measured.memory_of_stage[stage]))
        rows.append(_row("seconds, at least", planned.seconds, measured.seconds, unit=1))
        table = markdown_table(["", "planned", "measured", "off"], rows)
        parts.append(f"## {case.name}\n\n{num_bytes / 1e6:,.0f} MB of weights.\n\n{table}")
    return "\n\n".join(parts)


def main() -> None:
    """Compare every case and write the results; with --run be the measured process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_and_measure(arguments.run, arguments.threads)
        return
    made_by = environment(".venv/bin/python benchmarks/plan_accuracy.py", threads=arguments.threads)
    found = []
    for case in CASES:
        found.append((case, *compare(case, arguments.threads)))
        print(render(found[-1:]), flush=True)
    figures = [
        {"case": case.name, "bytes": size, "planned": asdict(planned), "measured": asdict(measured)}
        for case, size, planned, measured in found
    ]
    write_results("plan_accuracy", made_by=made_by, figures=figures, text=render(found))
    wrong = [
        f"{case.name}: {name}"
        for case, _, planned, measured in found
        for name in ("memory", "scratch", "tensors")
        if abs(_off(getattr(planned, name), getattr(measured, name))) > _TOLERANCE
    ]
    wrong += [
        f"{case.name}: bound on seconds"
        for case, _, planned, measured in found
        if planned.seconds > measured.seconds
    ]
    if wrong:
        sys.exit(f"more than {100 * _TOLERANCE:.0f} % off: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
