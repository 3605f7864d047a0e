"""Serve a model of seven billion weights with vLLM on a GPU: dense, as integers, low-rank, and both.

Random weights in the shape of Mistral-7B. All engines are loaded at once, each in a process of its own, and
take turns A B C A B C, so that the ratios come from one run on one card. As `vllm serve` runs them: compiled,
with CUDA graphs.

    python benchmarks/gpu_serving.py --scratch /dev/shm
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine_process import EngineEndedError, EngineProcess
from random_llama import write_dense, write_integers, write_low_rank
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.format.schema import WeightQuantization

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
DENSE = "dense bfloat16"
WORKLOADS = {
    "decode, batch 1": {"batch": 1, "prompt_tokens": 64, "output_tokens": 128},
    "decode, batch 16": {"batch": 16, "prompt_tokens": 64, "output_tokens": 128},
    "decode, batch 64": {"batch": 64, "prompt_tokens": 64, "output_tokens": 128},
    "prefill, batch 8 x 1024": {"batch": 8, "prompt_tokens": 1024, "output_tokens": 1},
}


def start(directory: Path, log: Path, *, eager: bool) -> EngineProcess:
    """Start an engine that shares the GPU with others."""
    arguments = {
        "model": str(directory),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "gpu_memory_utilization": 0.02,  # the cache's size is given
        "kv_cache_memory_bytes": 2 * 2**30,
    }
    return EngineProcess(arguments, {"HF_HUB_OFFLINE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, log)


def write_models(directory: Path, wanted: Iterable[str]) -> dict[str, Path]:
    """Write the models that are wanted, and the dense one; return name -> directory."""
    dense = directory / "dense"
    dense.mkdir()
    write_dense(dense, **SHAPE, tie_word_embeddings=False)
    found = {DENSE: dense}
    for bits in (8, 4, 3, 2):
        if (name := f"int{bits}") in wanted:
            found[name] = directory / name
            write_integers(found[name], dense, WeightQuantization(bits=bits, group_size=128))
    for removed, bits in ((0.2, None), (0.4, None), (0.2, 4), (0.4, 4)):
        name = f"low rank, {removed:.0%} removed" + (f", int{bits}" if bits else "")
        if name in wanted:
            found[name] = directory / f"low-rank-{removed}-{bits}"
            factors = WeightQuantization(bits=bits, group_size=64) if bits else None
            write_low_rank(found[name], dense, compression_ratio=removed, rank_multiple=128, factors=factors)
    return found


def render(ready: Mapping[str, Any], seconds: Mapping[str, Mapping[str, list[float]]], turns: int) -> str:
    """Return the Markdown text."""
    medians = {
        workload: {name: statistics.median(values) for name, values in by_name.items() if values}
        for workload, by_name in seconds.items()
    }
    cells = []
    for name, said in ready.items():
        if "error" in said:
            cells.append([name, "-", *("-" for _ in medians)])
            continue
        cells.append(
            [
                name,
                f"{said['bytes'] / 2**30:.1f} GiB",
                *(f"{1000 * m[name]:.0f} ms ({m[DENSE] / m[name]:.2f})" for m in medians.values()),
            ]
        )
    errors = [f"- {name}: {said['error']}" for name, said in ready.items() if "error" in said]
    failed = f"\n\nWhat did not start:\n\n{chr(10).join(errors)}" if errors else ""
    return f"""# Serving on a GPU

Random weights in the shape of Mistral-7B in vLLM, compiled, with CUDA graphs; all engines loaded at once and
in turns. Integers in groups of 128, those of factors in groups of 64; ranks are multiples of 128. Decoding:
64 prompt tokens and 128 output tokens a sequence. Milliseconds for the whole batch, median of {turns} turns,
and how many times faster than dense. "loaded" counts all tensors of the model on the GPU.

{markdown_table(["", "loaded", *medians], cells)}{failed}
"""


NAMES = (
    "int8",
    "int4",
    "int3",
    "int2",
    "low rank, 20% removed",
    "low rank, 40% removed",
    "low rank, 20% removed, int4",
    "low rank, 40% removed, int4",
)
DEFAULT = ("int8", "int4", "int3", "low rank, 40% removed", "low rank, 20% removed, int4")  # 70 GB with dense


def main() -> None:
    """Write the models, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=NAMES)
    parser.add_argument("--scratch", type=Path, help="where the models are written for a while: 45 GB")
    parser.add_argument("--logs", type=Path, help="folder where the engines' logs are kept")
    parser.add_argument("--eager", action="store_true", help="neither compiled nor with CUDA graphs")
    arguments = parser.parse_args()
    made_by = environment(" ".join(["python benchmarks/gpu_serving.py", *sys.argv[1:]]), threads=1)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        logs = arguments.logs or Path(scratch)
        started = time.monotonic()
        models = write_models(Path(scratch), arguments.models)
        print(f"written after {time.monotonic() - started:.0f} s", flush=True)
        engines = {
            name: start(path, logs / f"{path.name}.log", eager=arguments.eager)
            for name, path in models.items()
        }
        ready: dict[str, Any] = {}
        for name, engine in engines.items():
            try:
                ready[name] = engine.ready()
            except EngineEndedError as error:
                ready[name] = {"error": str(error)}
            print(f"{time.monotonic() - started:.0f} s", name, ready[name], flush=True)
        serving = {name: engine for name, engine in engines.items() if "error" not in ready[name]}
        seconds: dict[str, dict[str, list[float]]] = {}
        for workload, request in WORKLOADS.items():
            for engine in serving.values():
                engine.ask(request)  # warm up
            seconds[workload] = {name: [] for name in serving}
            for _ in range(arguments.turns):
                for name, engine in serving.items():
                    seconds[workload][name].append(engine.ask(request)["seconds"])
            medians = {name: round(statistics.median(v), 4) for name, v in seconds[workload].items()}
            print(workload, medians, flush=True)
        for engine in serving.values():
            engine.close()
    figures = {"engines": ready, "seconds": seconds}
    write_results(
        "gpu_serving", made_by=made_by, figures=figures, text=render(ready, seconds, arguments.turns)
    )


if __name__ == "__main__":
    main()
