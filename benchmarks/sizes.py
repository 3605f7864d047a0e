"""Every size beside every method, on one model: what the options of a budget are worth.

As in `peers.py`, from which the peers' environments come: the same calibration tokens, the dense matrices
that a compressed checkpoint stands for, one judge.

    python benchmarks/sizes.py --environments out/peers --model examples/tiny-llama

Rows are kept as JSON lines as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_runs.contenders import BATCH, ITERATIONS
from peer_runs.judge import paired
from peer_runs.size_contenders import (
    ALL,
    EARLIER,
    GGUF,
    METHODS,
    MIXED,
    MIXED_PEER,
    PEER,
    RECOVERED,
    UNIFORM,
    Training,
    gguf_contenders,
    size_contenders,
)
from peers import DENSE, LENGTH, TEXTS, WINDOWS, Measured, calibration_section
from results_file import environment, markdown_table, write_results

SHARE = 0.75  # of mixed-bit GPTQ's loss, the aim from 2.5 to 3.5 bits
SIZES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.25)


def table(rows: Mapping[tuple[str, float], Mapping[str, Any]], dense: Mapping[str, Any], text: str) -> str:
    """Return ln(perplexity / dense) on a text: a row a method, a column a size; intervals are of 95 %."""
    cells = []
    for method in METHODS:
        cell = [method]
        for size in SIZES:
            row = rows.get((method, size))
            if row is None or "losses" not in row:
                cell.append("")
                continue
            mean, half = paired(row["losses"][text], dense[text])
            cell.append(f"{mean:.3f} ± {half:.3f}")
        if any(cell[1:]):
            cells.append(cell)
    return markdown_table(["", *(f"{size} bits" for size in SIZES)], cells)


def comparison(rows: Mapping[tuple[str, float], Mapping[str, Any]], method: str, other: str) -> str:
    """Return how a method differs from another at each size, on the same windows; if any has both."""
    if not any({(method, size), (other, size)} <= rows.keys() for size in SIZES):
        return f"{method}, against {other}: no size has both."
    cells = []
    for text in TEXTS:
        cell = [text]
        for size in SIZES:
            pair = [rows.get((name, size), {}).get("losses") for name in (method, other)]
            if None in pair:
                cell.append("")
                continue
            mean, half = paired(pair[0][text], pair[1][text])
            cell.append(f"{mean:+.3f} ± {half:.3f}")
        cells.append(cell)
    return markdown_table([f"{method}, against {other}", *(f"{size} bits" for size in SIZES)], cells)


def shortfalls(rows: Mapping[tuple[str, float], Mapping[str, Any]], dense: Mapping[str, Any]) -> list[str]:
    """Return a line for each place where the aims are not met: what one budget is meant to be worth.

    Each tells how much more is lost, on the same windows, with its 95 % interval.
    """

    def more(
        method: str, other: str, size: float, text: str, share: float = 1.0
    ) -> tuple[float, float] | None:
        """Return by how much a method loses more than a share of what another loses, and the interval."""
        pair = [rows.get((name, size), {}).get("losses") for name in (method, other)]
        if None in pair:
            return None
        itself = dense[text]
        ours, theirs = ([one - zero for one, zero in zip(each[text], itself, strict=True)] for each in pair)
        return paired(ours, [share * each for each in theirs])

    lines = []
    for text in TEXTS:
        for size in SIZES:
            aims = [(ALL, method, 1.0) for method in (UNIFORM, MIXED, EARLIER)]
            aims += [(ALL, MIXED, SHARE)] if 2.5 <= size <= 3.5 else []
            aims += [(RECOVERED, method, 1.0) for method in (PEER, MIXED_PEER)]
            for method, other, share in aims:
                difference = more(method, other, size, text, share)
                if difference is not None and difference[0] > 0:
                    mean, half = difference
                    of_other = other if share == 1 else f"{share} of what {other} does"
                    noise = "" if mean > half else ", within the interval"
                    lost = f"{method} lose {mean:.3f} ± {half:.3f} more than {of_other}"
                    lines.append(f"- {size} bits, {text}: {lost}{noise}")
    return lines


def gguf_table(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> str:
    """Return what llama.cpp's types lose, the smallest first."""
    cells = []
    for row in sorted((row for row in rows if "losses" in row), key=lambda row: float(row["bits"])):
        lost = [paired(row["losses"][text], dense[text]) for text in TEXTS]
        cells.append(
            [row["name"], f"{row['bits']:.2f}", *(f"{mean:.3f} ± {half:.3f}" for mean, half in lost)]
        )
    return markdown_table(["", "bits per weight", *TEXTS], cells) if cells else "Not run yet."


def write_report(
    rows: Mapping[tuple[str, float], Mapping[str, Any]],
    gguf: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    unmeasured: Mapping[str, Sequence[float]],
    arguments: argparse.Namespace,
) -> None:
    """Write the results files."""
    errors = [f"- {row['name']}: {row['error']}" for row in (*rows.values(), *gguf) if "error" in row]
    errors += [
        f"- {method}: not run yet at {', '.join(map(str, sizes))} bits"
        for method, sizes in unmeasured.items()
    ]
    spread = [abs(row["bits"] - size) for (_, size), row in rows.items() if "bits" in row]
    tables = "\n\n".join(f"On {text}:\n\n{table(rows, dense, text)}" for text in TEXTS)
    text = f"""# Sizes: {arguments.model.name}

ln(perplexity / dense) on {WINDOWS} windows of {LENGTH} tokens of each held-out text, with 95 % intervals
over windows. Sizes are bits per weight of the decoder's Linears, scales included; what was stored is within
{max(spread, default=0):.2f} bits of its column. Calibrated on {arguments.samples} sequences of {LENGTH}
tokens of {arguments.text.name}, the same tokens for all. What trains, trains {arguments.steps} steps of
{arguments.batch_size} sequences, AutoRound too.
"All options": dense matrices of 2 to 8 bits, factors of 3, 4 and 8 bits, and low-rank corrections.

{tables}

llama.cpp's types have sizes of their own, and read no calibration tokens:

{gguf_table(gguf, dense)}

Paired by window:

{comparison(rows, ALL, MIXED)}

{comparison(rows, RECOVERED, ALL)}

## Where the aims are missed

All options are meant to lose less than every other row that does not train, and from 2.5 to 3.5 bits at most
{SHARE} of what mixed-bit GPTQ loses; recovered, less than AutoRound. Of what was measured that is not so at:

{chr(10).join(shortfalls(rows, dense)) or "No place."}

## What is not measured

{chr(10).join(errors) or "Nothing."}
"""
    command = f"python benchmarks/sizes.py --environments out/peers --model {arguments.model}"
    usual = {
        "samples": 16,
        "steps": ITERATIONS,
        "batch_size": BATCH,
        "name": f"sizes-{arguments.model.name.lower()}",
    }
    for option, default in usual.items():
        if (value := getattr(arguments, option)) != default:
            command += f" --{option.replace('_', '-')} {value}"
    made_by = environment(command, threads=arguments.threads)
    figures = [{"name": DENSE, "losses": dense}, *rows.values(), *gguf]
    write_results(arguments.name, made_by=made_by, figures=figures, text=text)


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    parser.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    parser.add_argument("--text", type=Path, default=Path("examples/text/calibration_prose.txt"))
    parser.add_argument("--correction-ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=ITERATIONS, help="of what trains")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="of what trains, in sequences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, GGUF), default=METHODS)
    parser.add_argument("--name", help="name of the results files; default sizes-MODEL")
    parser.add_argument("--rows", type=Path, help="rows measured so far; default out/NAME.jsonl")
    arguments = parser.parse_args()
    arguments.name = arguments.name or f"sizes-{arguments.model.name.lower()}"
    arguments.rows = arguments.rows or Path(f"out/{arguments.name}.jsonl")
    section = calibration_section(arguments.samples, arguments.text)
    measured = Measured.resume(arguments, section)
    cache = arguments.rows.with_suffix(".stages").resolve()
    if GGUF in arguments.methods:
        for contender in gguf_contenders():
            measured.add(contender)
    gguf = [
        measured.rows[contender.name] for contender in gguf_contenders() if contender.name in measured.rows
    ]
    training = Training(arguments.steps, arguments.batch_size)
    wanted = list(size_contenders(section, SIZES, arguments.correction_ranks, cache, training))
    for method, size, contender in wanted:
        if method in arguments.methods and size in arguments.sizes:
            measured.add(contender)
    rows = {
        (method, size): measured.rows[contender.name]
        for method, size, contender in wanted
        if contender.name in measured.rows
    }
    unmeasured: dict[str, list[float]] = {}
    for method, size, contender in wanted:
        if contender.name not in measured.rows:
            unmeasured.setdefault(method, []).append(size)
    write_report(rows, gguf, measured.rows[DENSE]["losses"], unmeasured, arguments)


if __name__ == "__main__":
    main()
