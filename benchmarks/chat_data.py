"""Calibrate a chat model as it is used: the same conversations in every form, beside plain text.

    .venv/bin/python benchmarks/chat_data.py [MODEL]

Passages of the example texts become conversations, "Continue this:" with a passage's beginning, answered by
the rest, and are written as people bring them. Each row is one run: plain GPTQ-4 of all decoder Linears,
calibrated on the passages as they are or on the conversations in one form, and judged on held-out passages
in both shapes. Writes `benchmarks/results/chat_data.json` and `.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe

CALIBRATION, HELD_OUT = Path("examples/text/calibration.txt"), Path("examples/text/in_domain.txt")
PASSAGE = 1600  # characters, of which a quarter is the question
Messages = list[dict[str, Any]]
Writer = Callable[[Path, Sequence[Mapping[str, Any]]], Path]


def passages(text: Path, count: int) -> list[str]:
    """Return the first passages of a text."""
    whole = text.read_text(encoding="utf-8")
    return [whole[start : start + PASSAGE] for start in range(0, count * PASSAGE, PASSAGE)]


def conversation(passage: str) -> Messages:
    """Return a passage as a question and its answer."""
    begun = PASSAGE // 4
    return [
        {"role": "user", "content": f"Continue this:\n{passage[:begun]}"},
        {"role": "assistant", "content": passage[begun:]},
    ]


def in_parts(messages: Messages) -> Messages:
    """Return messages whose content is a list of parts."""
    return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]


def share_gpt(messages: Messages) -> Messages:
    """Return messages with ShareGPT's keys."""
    return [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
        for turn in messages
    ]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines, compressed if the name says so."""
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_dataset(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a folder as `save_to_disk` of datasets does."""
    import datasets

    datasets.Dataset.from_list(list(rows)).save_to_disk(path)
    return path


def write_shards(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a folder of two files."""
    path.mkdir()
    half = len(rows) // 2
    write_lines(path / "part-0.jsonl", rows[:half])
    write_lines(path / "part-1.jsonl", rows[half:])
    return path


def write_forms(folder: Path, talks: Sequence[Messages]) -> dict[str, dict[str, str]]:
    """Write the same conversations in every form; return its name -> dataset as a recipe has it."""
    rows = [{"messages": talk} for talk in talks]
    forms: dict[str, tuple[str, str, Writer, list[dict[str, Any]]]] = {
        "jsonl": ("jsonl", "messages.jsonl", write_lines, rows),
        "jsonl, content in parts": (
            "jsonl",
            "parts.jsonl",
            write_lines,
            [{"messages": in_parts(talk)} for talk in talks],
        ),
        "jsonl.gz, ShareGPT's keys": (
            "jsonl",
            "share.jsonl.gz",
            write_lines,
            [{"conversations": share_gpt(talk)} for talk in talks],
        ),
        "parquet": ("parquet", "messages.parquet", write_parquet, rows),
        "save_to_disk": ("saved", "dataset", write_dataset, rows),
        "folder of shards": ("jsonl", "shards", write_shards, rows),
    }
    return {
        name: {form: str(write(folder / file, written))}
        for name, (form, file, write, written) in forms.items()
    }


@dataclass(frozen=True)
class Result:
    """One compressed model: ln(perplexity / that of the original) on the two shapes of held-out passages."""

    calibrated_on: str
    plain: float
    chat: float
    weights: str  # SHA-256 of all tensors: the same conversations give the same bytes


def measure(
    model: Path,
    calibrated_on: str,
    dataset: dict[str, str],
    held_out: Mapping[str, dict[str, str]],
    folder: Path,
) -> Result:
    """Run one recipe."""
    recipe = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {
            "dataset": dataset,
            "num_samples": 64,
            "sequence_length": 256,
            "seed": 3,
        },
        "stages": [{"quantize": {"bits": 4, "group_size": 64}}],
        "evaluation": {
            "perplexity": dict(held_out),
            "max_sequences": 64,
        },
        "export": {"path": str(folder / "export")},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    report, _ = run_recipe(load_recipe(file))
    lost = {}
    for name in held_out:
        before, after = report.original.perplexity[name], report.compressed.perplexity[name]
        assert before is not None
        assert after is not None
        lost[name] = math.log(after / before)
    assert report.weights_sha256 is not None
    return Result(calibrated_on, lost["plain"], lost["chat"], report.weights_sha256)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=Path("examples/tiny-llama"))
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        calibration = passages(CALIBRATION, arguments.passages)
        talks = [conversation(passage) for passage in calibration]
        unseen = passages(HELD_OUT, 60)
        held_out = {
            shape: {"jsonl": str(write_lines(folder / f"{shape}.jsonl", rows))}
            for shape, rows in {
                "plain": [{"text": passage} for passage in unseen],
                "chat": [{"messages": conversation(passage)} for passage in unseen],
            }.items()
        }
        plain = write_lines(folder / "text.jsonl", [{"text": passage} for passage in calibration])
        forms = {"plain text": {"jsonl": str(plain)}} | write_forms(folder, talks)
        for form, dataset in forms.items():
            with tempfile.TemporaryDirectory() as own:
                results.append(measure(arguments.model, form, dataset, held_out, Path(own)))
            print(results[-1], flush=True)
    write(arguments, results)


def write(arguments: argparse.Namespace, results: Sequence[Result]) -> None:
    """Write the results."""
    rows = [
        [result.calibrated_on, f"{result.plain:.4f}", f"{result.chat:.4f}", result.weights[:8]]
        for result in results
    ]
    forms = {result.weights for result in results[1:]}
    same = "All forms give the same bytes." if len(forms) == 1 else f"The forms give {len(forms)} models."
    text = f"""# The same conversations in every form, beside plain text

`{arguments.model.name}`, plain GPTQ-4 in groups of 64, 64 x 256 calibration tokens: ln(perplexity / dense) on
held-out passages as plain text, and as conversations rendered by the model's chat template.
{same}

{markdown_table(["calibrated on", "plain", "chat", "weights"], rows)}
"""
    made_by = environment(".venv/bin/python benchmarks/chat_data.py", threads=arguments.threads)
    write_results("chat_data", made_by=made_by, figures=[asdict(result) for result in results], text=text)


if __name__ == "__main__":
    main()
