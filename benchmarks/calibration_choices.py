"""What each choice about calibration and rounding is worth: GPTQ with one key changed at a time.

    python benchmarks/calibration_choices.py --model examples/tiny-llama

Every row is a run of the pipeline, judged like the peers in `peers.py` on text like the calibration's and on
text of another kind. Rows are kept as JSON lines as they are measured; a run that was stopped goes on from
there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_runs.contenders import GROUP_SIZE, Contender
from peer_runs.judge import paired
from peers import DENSE, LENGTH, TEXTS, WINDOWS, Measured, calibration_section
from results_file import environment, markdown_table, write_results

PROSE, CODE = Path("examples/text/calibration_prose.txt"), Path("examples/text/calibration.txt")
AS_IS = "the defaults"


@dataclass(frozen=True)
class Change:
    """What differs from the defaults in one row.

    Attributes:
        calibration: Keys of the calibration section.
        quantize: Keys of the quantize stage.
        more_samples: How many times the calibration sequences.
    """

    calibration: Mapping[str, Any] = field(default_factory=dict)
    quantize: Mapping[str, Any] = field(default_factory=dict)
    more_samples: int = 1


MIXTURE = [{"text": str(text.resolve()), "share": 1} for text in (PROSE, CODE)]
CHANGES = {
    AS_IS: Change(),
    "tokens by their energy": Change(calibration={"token_weight": "uniform"}),
    "tokens by sensitivity": Change(calibration={"token_weight": "sensitivity"}),
    "damping 0.01": Change(quantize={"damping": 0.01}),
    "damping 0.1": Change(quantize={"damping": 0.1}),
    "no scale search": Change(quantize={"mse": False}),
    "asymmetric": Change(quantize={"sym": False}),
    "inputs of the original": Change(quantize={"compressed_prefix_inputs": False}),
    "columns in their order": Change(quantize={"desc_act": False}),
    "three times the sequences": Change(more_samples=3),
    "half of it source code": Change(calibration={"dataset": None, "datasets": MIXTURE}),
    "rounding to nearest": Change(quantize={"method": "rtn"}),
}


def contenders(calibration: Mapping[str, Any], all_bits: Sequence[int]) -> list[tuple[str, int, Contender]]:
    """Return change, bits and contender of every row."""
    found = []
    for name, change in CHANGES.items():
        section = {**calibration, **change.calibration}
        section = {key: value for key, value in section.items() if value is not None}
        section["num_samples"] = change.more_samples * calibration["num_samples"]
        for bits in all_bits:
            stage = {"bits": bits, "group_size": GROUP_SIZE, **change.quantize}
            options = {"calibration": section, "stages": [{"quantize": stage}]}
            found.append((name, bits, Contender(f"{name}, {bits} bits", "ours", "ours_run.py", options)))
    return found


def table(rows: Mapping[tuple[str, int], Mapping[str, Any]], dense: Mapping[str, Any], bits: int) -> str:
    """Return ln(perplexity / dense) of every row at some bits, and the difference from the defaults."""
    reference = rows.get((AS_IS, bits), {}).get("losses")
    cells = []
    for name in CHANGES:
        row = rows.get((name, bits))
        if row is None or "losses" not in row:
            continue
        cell = [name, f"{row['bits']:.2f}"]
        for text in TEXTS:
            mean, half = paired(row["losses"][text], dense[text])
            cell.append(f"{mean:.3f} ± {half:.3f}")
            if name == AS_IS or reference is None:
                cell.append("")
                continue
            mean, half = paired(row["losses"][text], reference[text])
            cell.append(f"{mean:+.3f} ± {half:.3f}")
        cells.append([*cell, f"{row['core_seconds']:.0f} s"])
    columns = [column for text in TEXTS for column in (text, f"{text}, against {AS_IS}")]
    return markdown_table(["", "bits per weight", *columns, "core time"], cells)


def write_report(
    rows: Mapping[tuple[str, int], Mapping[str, Any]],
    dense: Mapping[str, Any],
    unmeasured: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    """Write the results files."""
    errors = [f"- {row['name']}: {row['error']}" for row in rows.values() if "error" in row]
    errors += [f"- {name}: not run yet" for name in unmeasured]
    tables = "\n\n".join(f"## {bits} bits\n\n{table(rows, dense, bits)}" for bits in arguments.bits)
    text = f"""# Choices about calibration and rounding: {arguments.model.name}

GPTQ in groups of {GROUP_SIZE}, one key changed at a time. ln(perplexity / dense) on {WINDOWS} windows of
{LENGTH} tokens of held-out prose and of Python source, with 95 % intervals over windows, paired. Calibrated
on {arguments.samples} sequences of {LENGTH} tokens of {PROSE.name}. The defaults: every token counts alike
(`token_weight: unit_norm`), `damping: auto`, `mse: auto` (searched at these bits), symmetric, inputs behind
the layers already quantized, columns by their activations.

{tables}

## What is not measured

{chr(10).join(errors) or "Nothing."}
"""
    bits = " ".join(map(str, arguments.bits))
    command = f".venv/bin/python benchmarks/calibration_choices.py --model {arguments.model} --bits {bits}"
    write_results(
        f"calibration_choices-{arguments.model.name.lower()}",
        made_by=environment(command, threads=arguments.threads),
        figures=[{"name": DENSE, "losses": dense}, *rows.values()],
        text=text,
    )


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*CHANGES, "nothing"], default=list(CHANGES))
    parser.add_argument("--rows", type=Path, help="rows measured so far; default out/choices-MODEL.jsonl")
    arguments = parser.parse_args()
    arguments.environments = Path("out/peers")  # of which ours needs none
    arguments.rows = arguments.rows or Path(f"out/choices-{arguments.model.name.lower()}.jsonl")
    section = calibration_section(arguments.samples, PROSE)
    measured = Measured.resume(arguments, section)
    wanted = contenders(section, arguments.bits)
    for name, _, contender in wanted:
        if name in arguments.only:
            measured.add(contender)
    rows = {
        (name, bits): measured.rows[contender.name]
        for name, bits, contender in wanted
        if contender.name in measured.rows
    }
    unmeasured = [contender.name for _, _, contender in wanted if contender.name not in measured.rows]
    write_report(rows, measured.rows[DENSE]["losses"], unmeasured, arguments)


if __name__ == "__main__":
    main()
