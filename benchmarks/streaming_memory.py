"""Compress a model that does not fit: `ercsvd run` within a fifth of the memory of its weights.

    .venv/bin/python benchmarks/streaming_memory.py

Writes a random Llama, then runs `ercsvd run` on it (calibrate, factorize, measure perplexity, export) in a
process that may hold only a fifth of the weights' bytes beyond what the imported libraries take: a watching
thread ends it when its resident memory exceeds that, and the kernel's own counter of the peak is compared at
the end. As a control, transformers tries to load the same model whole under the same limit. Writes
`benchmarks/results/streaming_memory.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from results_file import environment, markdown_table, write_results

TOKENIZER = Path("examples/tiny-llama")
CALIBRATION_TEXT = Path("examples/text/calibration.txt")
HELD_OUT_TEXT = Path("examples/text/in_domain.txt")
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
VOCAB_SIZE = 8192  # as many parameters beside those of a layer as in Llama-2-7B
_SAMPLING_INTERVAL_S = 0.02
_ALLOWED_SHARE = 1 / 5
_LARGEST_BLOCK_KEPT = 4 * 2**20


@dataclass(frozen=True)
class Measurement:
    """Memory of one process, in bytes, and how it ended."""

    finished: bool
    message: str  # last line of what it complained about
    seconds: float
    baseline: int  # resident after the imports
    peak: int  # highest resident memory, the libraries' and the files' pages included
    peak_anonymous: int  # of it, highest that is not backed by a file (sampled)
    baseline_anonymous: int

    @property
    def above_baseline(self) -> int:
        """What the work added to the libraries."""
        return self.peak - self.baseline


def read_status() -> dict[str, int]:
    """Return the memory counters of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def work_under_limit(arguments: argparse.Namespace) -> None:
    """Be the measured process: import, note the baseline, work, report on the last line.

    A thread ends the process as soon as it sees more resident memory than is allowed; what it may miss
    between two looks is in the kernel's own counter of the peak, which is compared at the end.
    """
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401 - what a run imports is the baseline

    from ercsvd_deploy.pipelines import flow as _pipeline  # noqa: F401 - likewise

    torch.set_num_threads(arguments.threads)
    at_start = read_status()
    highest = at_start["VmRSS"] + arguments.allowed_bytes
    peak_anonymous = at_start["RssAnon"]
    reporting = threading.Lock()
    started = time.monotonic()

    def report(complaint: str) -> NoReturn:
        """Print the measurement and end the process, whatever its threads are doing."""
        with reporting:
            peak = read_status()["VmHWM"]
            if not complaint and peak > highest:
                complaint = "more memory than is allowed, for a moment"
            measured = Measurement(
                finished=not complaint,
                message=complaint,
                seconds=round(time.monotonic() - started, 1),
                baseline=at_start["VmRSS"],
                peak=peak,
                peak_anonymous=peak_anonymous,
                baseline_anonymous=at_start["RssAnon"],
            )
            print(json.dumps(asdict(measured)), flush=True)
            os._exit(0)

    def watch() -> None:
        nonlocal peak_anonymous
        while True:
            time.sleep(_SAMPLING_INTERVAL_S)
            now = read_status()
            peak_anonymous = max(peak_anonymous, now["RssAnon"])
            if now["VmRSS"] > highest:
                report("more memory than is allowed")

    threading.Thread(target=watch, daemon=True).start()
    report(WORK[arguments.work](arguments))


def run_recipe_by_command_line(arguments: argparse.Namespace) -> str:
    """Do what `ercsvd run` does; return what went wrong, or nothing."""
    from ercsvd_deploy.pipelines.cli.app import app

    exit_code = app(["run", str(arguments.recipe)], standalone_mode=False)
    if exit_code:
        return f"exit code {exit_code}"
    is_there = (arguments.recipe.parent / "out" / "config.json").is_file()
    return "" if is_there else "nothing was exported"


def load_whole(arguments: argparse.Namespace) -> str:
    """Load the model as the run would have to without streaming: in float32, to be computed with."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    return ""


WORK = {"run": run_recipe_by_command_line, "load": load_whole}


def measure(work: str, directory: Path, *, allowed_bytes: int, threads: int) -> Measurement:
    """Run `work_under_limit` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *("--work", work, "--model", str(directory / "model"), "--recipe", str(directory / "recipe.json")),
        *("--allowed-bytes", str(allowed_bytes), "--threads", str(threads)),
    ]
    # Give freed blocks back at once. By default glibc keeps those below 32 MiB, which most tensors of a model
    # this small are, and none of a large one's.
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_LARGEST_BLOCK_KEPT)}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=surroundings)
    try:
        return Measurement(**json.loads(found.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Measurement(False, f"ended with status {found.returncode}", 0.0, 0, 0, 0, 0)


def write_model(directory: Path, num_layers: int, tokenizer: Path) -> dict[str, int]:
    """Write the random model with a tokenizer; return its number of parameters and bytes."""
    from random_llama import write_dense

    directory.mkdir()
    architecture = write_dense(
        directory, **SHAPE, num_hidden_layers=num_layers, vocab_size=VOCAB_SIZE, tie_word_embeddings=False
    )
    for path in [*tokenizer.glob("tokenizer*"), *tokenizer.glob("special_tokens_map.json")]:
        shutil.copy(path, directory)
    layer = sum(linear.parameters for linear in architecture.layers[0].linears)
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {"parameters": architecture.total_parameters, "bytes": num_bytes, "layer_parameters": layer}


def write_recipe(directory: Path, method: str, compressed_layers: int, samples: int) -> None:
    """Write the recipe; JSON is YAML."""
    stage: dict[str, Any] = {
        "method": method,
        "compression_ratio": 0.2,
        "num_compressed_layers": compressed_layers,
    }
    recipe = {
        "model": {"path": str(directory / "model")},
        "calibration": {
            "dataset": {"text": str(CALIBRATION_TEXT)},
            "num_samples": samples,
            "sequence_length": 256,
        },
        "stages": [{"factorize": stage}],
        "evaluation": {"perplexity": {"in_domain": str(HELD_OUT_TEXT)}, "max_sequences": samples},
        # A shard is in memory as a whole while it is written.
        "export": {"path": str(directory / "out"), "max_shard_size": "100MB"},
    }
    (directory / "recipe.json").write_text(json.dumps(recipe))


def mib(num_bytes: float) -> str:
    """Write a number of bytes in MiB."""
    return f"{num_bytes / 2**20:,.0f}"


def render(
    arguments: argparse.Namespace,
    size: dict[str, int],
    allowed_bytes: int,
    streamed: Measurement,
    whole: Measurement,
) -> str:
    """Return the Markdown text."""
    names = (f"`ercsvd run`, {arguments.method}", "transformers, whole model in float32")
    rows = [
        [
            name,
            "finished" if found.finished else f"failed: {found.message}",
            mib(found.baseline),
            mib(found.peak),
            f"**{mib(found.above_baseline)}**",
            mib(found.peak_anonymous - found.baseline_anonymous),
            f"{100 * found.above_baseline / size['bytes']:.0f} %",
            f"{found.seconds:.0f}",
        ]
        for name, found in zip(names, (streamed, whole), strict=True)
    ]
    columns = [
        "",
        "result",
        "imports alone, MiB",
        "peak, MiB",
        "peak above imports, MiB",
        "anonymous above imports, MiB",
        "peak above imports / weights",
        "seconds",
    ]
    return f"""# Compressing a model larger than the memory allowed

A random Llama of {arguments.layers} layers, hidden {SHAPE["hidden_size"]}, vocabulary {VOCAB_SIZE},
{size["parameters"] / 1e6:,.0f} M parameters: **{mib(size["bytes"])} MiB** of bfloat16 weights,
{mib(2 * size["layer_parameters"])} MiB a layer. Allowed above the imports: **{mib(allowed_bytes)} MiB**,
1/{size["bytes"] / allowed_bytes:.1f} of the weights; a process that exceeds it is ended. The run calibrates
({arguments.samples} sequences of 256 tokens), factorizes the last {arguments.compressed_layers} layers,
measures perplexity before and after, and exports the whole model. Peaks are resident memory (VmHWM).

{markdown_table(columns, rows)}
"""


def benchmark(arguments: argparse.Namespace) -> None:
    """Write the model, measure both ways, write the results."""
    made_by = environment(".venv/bin/python benchmarks/streaming_memory.py", threads=arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        directory = Path(scratch)
        size = write_model(directory / "model", arguments.layers, arguments.tokenizer)
        write_recipe(directory, arguments.method, arguments.compressed_layers, arguments.samples)
        allowed_bytes = 2**60 if arguments.unlimited else int(size["bytes"] * _ALLOWED_SHARE)
        print({**size, "allowed_bytes": allowed_bytes}, flush=True)
        streamed = measure("run", directory, allowed_bytes=allowed_bytes, threads=arguments.threads)
        print(streamed, flush=True)
        whole = measure("load", directory, allowed_bytes=allowed_bytes, threads=arguments.threads)
        print(whole, flush=True)
    if arguments.unlimited:
        return
    figures = {
        "model": size,
        "allowed_bytes": allowed_bytes,
        "streamed": asdict(streamed),
        "whole": asdict(whole),
    }
    text = render(arguments, size, allowed_bytes, streamed, whole)
    write_results("streaming_memory", made_by=made_by, figures=figures, text=text)
    if not streamed.finished:
        sys.exit(f"the run did not keep within the limit: {streamed.message}")


def main() -> None:
    """Parse the command line; with --work be the measured process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=112)
    parser.add_argument("--method", default="erc_svd", choices=["svd", "asvd", "svd_llm", "erc_svd"])
    parser.add_argument("--compressed-layers", type=int, default=32, help="the last ones, at 20 % of all")
    parser.add_argument("--samples", type=int, default=8, help="sequences to calibrate and to judge with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="directory that holds one")
    parser.add_argument("--scratch", type=Path, help="where the model is written for the time being")
    parser.add_argument("--unlimited", action="store_true", help="measure without a limit, write no results")
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--allowed-bytes", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work_under_limit(arguments)
    else:
        benchmark(arguments)


if __name__ == "__main__":
    main()
