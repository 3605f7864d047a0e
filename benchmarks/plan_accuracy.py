"""Is what `ercsvd plan` says about memory and disk true? Plan and measure three models, and compare.

    .venv/bin/python benchmarks/plan_accuracy.py

Each recipe is planned, then run in a process of its own that notes, stage by stage, the kernel's counter of the
highest resident memory (VmHWM, reset at the start of every stage); meanwhile this process watches the
size of the work directory. Writes `benchmarks/results/plan_accuracy.json` and `.md`; ends with an error if a
whole run's memory, scratch or bytes are more than 15 % off.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results_file import environment, markdown_table, write_results

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples/tiny-llama"
TEXTS = ROOT / "examples/text"
_INTERVAL_S = 0.02
_TOLERANCE = 0.15
_EXPORT = "export"


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
        "tiny-llama, ERC-SVD with search, GPTQ-4",
        None,
        {
            "calibration": _calibration(128, 256),
            "stages": [
                {"factorize": {"method": "erc_svd", "compression_ratio": 0.2, "num_compressed_layers": "auto", "rank_multiple": "auto"}},
                {"quantize": {"bits": 4, "group_size": 32}},
            ],
            "evaluation": _evaluation(256, 64),
        },
    ),
    Case(
        "hidden 1024, 8 layers, ERC-SVD with search, GPTQ-4",
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 8192,
        },
        {
            "calibration": _calibration(40, 256),
            "stages": [
                {
                    "factorize": {
                        "method": "erc_svd",
                        "compression_ratio": 0.3,
                        "num_compressed_layers": "auto",
                        "num_search_samples": 8, "rank_multiple": "auto",
                    }
                },
                {"quantize": {"bits": 4, "group_size": 64}},
            ],
            "evaluation": _evaluation(256, 8),
            "export": {"max_shard_size": "100MB"},
        },
    ),
    Case(
        "hidden 768, 12 layers, SVD-LLM, pivoted, bfloat16, vocabulary 16384",
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


def read_status() -> dict[str, int]:
    """Return the memory counters of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def run_and_measure(recipe: Path, threads: int) -> None:
    """Be the measured process; print the highest memory of every stage as the last line."""
    import torch

    from ercsvd_deploy.pipelines.run import run_recipe
    from ercsvd_deploy.recipe import load_recipe

    torch.set_num_threads(threads)
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    trail: dict[str, list[int]] = {}
    current, since = "", time.monotonic()

    def begin(name: str) -> None:
        nonlocal current, since
        peaks[current] = max(peaks.get(current, 0), read_status()["VmHWM"])
        seconds[current] = time.monotonic() - since
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        current, since = name, time.monotonic()

    @contextmanager
    def progress(title: str, _steps: int) -> Iterator[Callable[[], None]]:
        begin(title)
        seen = trail.setdefault(title, [])
        yield lambda: seen.append(read_status()["VmRSS"])
        begin(_EXPORT)

    begin("start")
    run_recipe(load_recipe(recipe), device=torch.device("cpu"), progress=progress)
    begin("end")
    print(json.dumps({"peaks": peaks, "seconds": seconds, "trail": trail}), flush=True)


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory that may be changing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    if arguments.run:
        run_and_measure(arguments.run, arguments.threads)
        return
    from random_llama import write_dense

    for number, case in enumerate(CASES):
        if arguments.only is not None and number != arguments.only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            d = Path(scratch)
            if case.shape is None:
                model = TINY
            else:
                model = d / "model"
                model.mkdir()
                write_dense(model, **case.shape, max_position_embeddings=1024)
                for path in TINY.glob("tokenizer*"):
                    shutil.copy(path, model)
            recipe = {"model": {"path": str(model)}, **case.settings}
            recipe["export"] = {**recipe.get("export", {}), "path": str(d / "out")}
            (d / "recipe.json").write_text(json.dumps(recipe))
            t = time.time()
            child = subprocess.Popen(
                [sys.executable, __file__, "--run", str(d / "recipe.json"), "--threads", str(arguments.threads)],
                stdout=subprocess.PIPE, text=True,
            )
            peak = 0
            seen = {}
            while child.poll() is None:
                total = directory_bytes(d / ".out.work")
                if total > peak:
                    peak = total
                    seen = {p.name: directory_bytes(p) for p in (d / ".out.work").glob("*")}
                time.sleep(_INTERVAL_S)
            out = child.stdout.read()
            print(case.name, round(time.time() - t), "s; scratch peak", peak, seen)
            r = json.loads(out.splitlines()[-1])
            for k, v in r["peaks"].items():
                print("   ", k, v >> 20, "MiB", round(r["seconds"][k], 1), "s", [x >> 20 for x in r["trail"].get(k, [])])
            print("   export", directory_bytes(d / "out"))


if __name__ == "__main__":
    main()
