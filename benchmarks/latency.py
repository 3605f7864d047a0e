"""Serve a dense and a low-rank model with vLLM on the CPU and compare their latencies in one run.

    .venv/bin/python benchmarks/latency.py

A random Llama large enough to be bound by memory (hidden 2048, 8 layers, bfloat16), and the same with 40 %
of its decoder's parameters removed from all layers at the ranks that a recipe would get. Both engines are
loaded at once, each in a process of its own on the same cores, and take turns: A B A B, so that whatever
else the machine does hits both; a turn during which other processes took these cores is taken again. The
ratio of the medians is what counts. Writes `benchmarks/results/latency.json` and `.md`, with a profile of
where each spends its time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine_process import EngineProcess
from random_llama import write_dense, write_low_rank
from results_file import environment, markdown_table, write_results

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
WORKLOADS = {
    "decode, batch 1": {"batch": 1, "prompt_tokens": 32, "output_tokens": 64},
    "decode, batch 8": {"batch": 8, "prompt_tokens": 32, "output_tokens": 64},
    "prefill, batch 4 x 512": {"batch": 4, "prompt_tokens": 512, "output_tokens": 1},
}
COMPRESSION_RATIO = 0.4
WANTED_RATIO = 1.25
MOST_OTHER_LOAD = 0.1  # share of the engines' cores
_MODELS = ("dense", "low-rank")


@dataclass(frozen=True)
class Timing:
    """One workload in one mode."""

    mode: str
    workload: str
    seconds: dict[str, list[float]]  # model -> latency of every repetition
    disturbed: int  # turns taken again because other processes took the cores
    profile: dict[str, dict[str, float]]  # model -> operator -> milliseconds of its own

    def median(self, model: str) -> float:
        """Return the model's median latency in seconds."""
        return statistics.median(self.seconds[model])

    @property
    def ratio(self) -> float:
        """How many times faster the low-rank model is."""
        return self.median("dense") / self.median("low-rank")

    @property
    def paired_ratios(self) -> list[float]:
        """The ratio within each turn."""
        pairs = zip(self.seconds["dense"], self.seconds["low-rank"], strict=True)
        return [dense / low for dense, low in pairs]


class OtherLoad:
    """The share of the engines' cores that other processes took since this was made.

    vLLM's threads are bound to cores and wait for each other by spinning: one core taken away for a moment
    costs a turn seconds, which would say nothing about the models.
    """

    def __init__(self, engines: Iterable[Engine], cores: range) -> None:
        self._engines = tuple(engines)
        self._cores = cores
        self._started = time.monotonic()
        self._busy = self._busy_by_others()

    def share(self) -> float:
        """Return the mean share, 0 to 1."""
        elapsed = time.monotonic() - self._started
        return (self._busy_by_others() - self._busy) / (elapsed * len(self._cores))

    def _busy_by_others(self) -> float:
        """Return seconds since boot that these cores spent neither idle nor on an engine."""
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        ticks = {name: list(map(int, counts)) for name, *counts in lines if name.startswith("cpu")}
        user, nice, system, irq, soft_irq = 0, 1, 2, 5, 6
        busy = sum(
            ticks[f"cpu{core}"][kind] for core in self._cores for kind in (user, nice, system, irq, soft_irq)
        )
        own = sum(sum(engine.clock_ticks()) for engine in self._engines)
        return (busy - own) / os.sysconf("SC_CLK_TCK")


def bound_to(cores: range) -> dict[str, str]:
    """Return the variables with which vLLM binds its worker processes to cores and speeds up allocation.

    It sets them for processes it starts itself; the engine here runs in the process that is profiled.
    """
    site_packages = [Path(find_spec(name).submodule_search_locations[0]) for name in ("vllm", "torch")]
    vllm, torch = site_packages
    candidates = [
        vllm.glob("libs/libtcmalloc*"),
        torch.glob("lib/libgomp*"),
        torch.parent.glob("torch.libs/libgomp*"),
    ]
    return {
        "LD_PRELOAD": ":".join(str(path) for paths in candidates for path in sorted(paths)[:1]),
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
    }


class Engine(EngineProcess):
    """An engine that serves one model on some cores."""

    def __init__(self, directory: Path, *, eager: bool, cores: range) -> None:
        arguments = {
            "model": str(directory),
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "enforce_eager": eager,
        }
        super().__init__(arguments, bound_to(cores) | {"VLLM_CPU_KVCACHE_SPACE": "1"})
        self.started = self.ready()

    def clock_ticks(self) -> tuple[int, int]:
        """Return the processor time the process has used: user, system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]), int(fields[12])


def take_turns(
    engines: Mapping[str, Engine], request: dict[str, int], repetitions: int, cores: range
) -> tuple[dict[str, list[float]], int]:
    """Return every model's latencies in undisturbed turns A B A B, and how many turns were disturbed."""
    seconds: dict[str, list[float]] = {model: [] for model in engines}
    disturbed = 0
    while len(seconds["dense"]) < repetitions:
        load = OtherLoad(engines.values(), cores)
        turn = {model: engine.ask(request)["seconds"] for model, engine in engines.items()}
        if load.share() > MOST_OTHER_LOAD:
            disturbed += 1
            continue
        for model, latency in turn.items():
            seconds[model].append(latency)
    return seconds, disturbed


def measure(
    directory: Path, mode: str, repetitions: int, cores: range
) -> tuple[list[Timing], dict[str, Any]]:
    """Time all workloads with both engines taking turns; also what the engines said when they were ready."""
    engines = {model: Engine(directory / model, eager=mode == "eager", cores=cores) for model in _MODELS}
    started = {model: engine.started for model, engine in engines.items()}
    print(mode, started, flush=True)
    timings = []
    for workload, request in WORKLOADS.items():
        take_turns(engines, request, 1, cores)  # warm up
        seconds, disturbed = take_turns(engines, request, repetitions, cores)
        profiled = {model: engine.ask({**request, "profile": True}) for model, engine in engines.items()}
        profiles = {model: answer["milliseconds"] for model, answer in profiled.items()}
        timings.append(Timing(mode, workload, seconds, disturbed, profiles))
        print(mode, workload, seconds, disturbed, f"ratio {timings[-1].ratio:.3f}", flush=True)
    for engine in engines.values():
        engine.close()
    return timings, started


def write_models(directory: Path, rank_multiple: int) -> dict[str, Any]:
    """Write both models; return their decoder-Linear parameters and the ranks."""
    (directory / "dense").mkdir()
    architecture = write_dense(directory / "dense", **SHAPE, tie_word_embeddings=False)
    modules = write_low_rank(
        directory / "low-rank",
        directory / "dense",
        compression_ratio=COMPRESSION_RATIO,
        rank_multiple=rank_multiple,
    )
    kept = architecture.linear_parameters + sum(
        description.num_parameters - description.shape[0] * description.shape[1]
        for description in modules.values()
    )
    ranks: dict[str, set[int]] = {}
    for name, description in modules.items():
        ranks.setdefault(name.rpartition(".")[2], set()).add(description.rank or 0)
    return {
        "linear_parameters": {"dense": architecture.linear_parameters, "low-rank": kept},
        "ranks": {leaf: sorted(values) for leaf, values in ranks.items()},
    }


def render(sizes: dict[str, Any], timings: list[Timing], repetitions: int) -> str:
    """Return the Markdown text."""
    linear = sizes["linear_parameters"]
    rows = [
        [
            timing.workload,
            timing.mode,
            f"{timing.median('dense'):.3f}",
            f"{timing.median('low-rank'):.3f}",
            f"**{timing.ratio:.2f}**",
            f"{min(timing.paired_ratios):.2f} .. {max(timing.paired_ratios):.2f}",
            str(timing.disturbed),
        ]
        for timing in timings
    ]
    columns = [
        "workload",
        "mode",
        "dense, s",
        "low-rank, s",
        "dense / low-rank",
        "ratio turn by turn",
        "turns retaken",
    ]
    decode = [timing.ratio for timing in timings if timing.workload.startswith("decode")]
    reached = "reached" if min(decode) >= WANTED_RATIO else "NOT reached everywhere: see the profile"
    ranks = ", ".join(f"{leaf} {'/'.join(map(str, values))}" for leaf, values in sizes["ranks"].items())
    return f"""# Latency in vLLM on the CPU: dense against low-rank, both bfloat16

A random Llama, hidden {SHAPE["hidden_size"]}, intermediate {SHAPE["intermediate_size"]},
{SHAPE["num_hidden_layers"]} layers, {SHAPE["num_attention_heads"]} heads. Decoder-Linear parameters
{linear["dense"] / 1e6:.0f} M against {linear["low-rank"] / 1e6:.0f} M
({100 * (1 - linear["low-rank"] / linear["dense"]):.1f} % removed from all layers; embeddings and output layer
alike). Ranks: {ranks}. Decoding: 32 prompt tokens, 64 output tokens. Median of {repetitions} turns A B A B;
a turn in which other processes took more than {100 * MOST_OTHER_LOAD:.0f} % of these cores was taken again.

{markdown_table(columns, rows)}

Goal: at least {WANTED_RATIO} when decoding. Lowest ratio when decoding: {min(decode):.2f}, {reached}.

## Where the time goes

Self time in ms of the largest operators in one profiled repetition (the profiler itself slows small ones).

{chr(10).join(_profile_table(timing) for timing in timings)}
"""


def _profile_table(timing: Timing, most: int = 6) -> str:
    dense, low = timing.profile["dense"], timing.profile["low-rank"]
    total = {name: dense.get(name, 0.0) + low.get(name, 0.0) for name in {*dense, *low}}
    largest = sorted(total, key=lambda name: -total[name])[:most]
    rows = [[f"`{name}`", f"{dense.get(name, 0.0):.0f}", f"{low.get(name, 0.0):.0f}"] for name in largest]
    return f"{timing.workload}, {timing.mode}:\n\n{markdown_table(['operator', *_MODELS], rows)}\n"


def main() -> None:
    """Write the models, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--first-core", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="cores of both engines, from the first on")
    parser.add_argument("--rank-multiple", type=int, default=64)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--name", default="latency", help="name of the results files")
    arguments = parser.parse_args()
    cores = range(arguments.first_core, arguments.first_core + arguments.threads)
    made_by = environment(
        " ".join([".venv/bin/python benchmarks/latency.py", *sys.argv[1:]]), threads=arguments.threads
    )
    timings: list[Timing] = []
    started = {}
    with tempfile.TemporaryDirectory() as scratch:
        sizes = write_models(Path(scratch), arguments.rank_multiple)
        print(sizes, flush=True)
        for mode in arguments.modes:
            measured, started[mode] = measure(Path(scratch), mode, arguments.repetitions, cores)
            timings += measured
    figures = {
        "models": sizes,
        "engines": started,
        "timings": [asdict(timing) | {"ratio": timing.ratio} for timing in timings],
    }
    write_results(
        arguments.name,
        made_by=made_by,
        figures=figures,
        text=render(sizes, timings, arguments.repetitions),
    )


if __name__ == "__main__":
    main()
