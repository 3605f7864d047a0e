"""What reviewers of ERC-SVD asked, answered by runs: which layers, which beta, which calibration.

ln(perplexity / dense) of the embedded Llama on both texts; every row is one run of the pipeline, as in
quality.py.

    python benchmarks/ablations.py --jobs 3

Rows are kept in a file of JSON lines as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import quality  # also sets the number of threads, before torch
import torch
from quality import OURS, PREFIX, SAMPLES, TEXTS, WINDOWS, Point
from results_file import environment, markdown_table, write_results

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_texts import is_reference_held_out

MODEL = "tiny-llama"
RATIOS = (0.2, 0.4)
ALL: dict[str, Any] = {"num_compressed_layers": "all"}
BEST_OF_OURS = OURS | PREFIX
LAYERS = {  # of eight
    "all": tuple(range(8)),
    "last 6": tuple(range(2, 8)),
    "first 6": tuple(range(6)),
    "last 4": tuple(range(4, 8)),
    "first 4": tuple(range(4)),
    "middle 4": tuple(range(2, 6)),
    "every other": (1, 3, 5, 7),
}
SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Variant:
    """One row to measure."""

    table: str
    name: str
    ratio: float
    settings: Mapping[str, Any]
    samples: int = SAMPLES
    on_prose: bool = False  # calibrated on English prose, not on Python source
    layers: tuple[int, ...] | None = None  # which are compressed; None: as the settings say

    @property
    def key(self) -> list[Any]:
        """What tells it apart."""
        return [self.table, self.name, self.ratio]


@dataclass(frozen=True)
class Row:
    """What was measured."""

    key: list[Any]
    excess: dict[str, float]
    ranks: dict[str, int | None] = field(default_factory=dict)


def variants() -> Iterator[Variant]:
    """Yield everything to measure."""
    for ratio in RATIOS:
        for name, layers in LAYERS.items():
            settings = {"method": "svd_llm", "num_compressed_layers": len(layers)}
            yield Variant("Which layers", name, ratio, settings, layers=layers)
        for method in ("svd", "asvd", "svd_llm", "erc_svd"):
            yield Variant("Partial-layer compression", f"{method}, all", ratio, {"method": method} | ALL)
            best = {"method": method, "num_compressed_layers": "auto"}
            yield Variant("Partial-layer compression", f"{method}, best k", ratio, best)
        for beta in (0.0, 0.02, 0.05, 0.1, 0.2, "auto"):
            settings = {"method": "erc_svd", "beta": beta} | ALL
            yield Variant("Share of the residual", f"beta {beta}", ratio, settings)
    contenders = {"svd_llm": {"method": "svd_llm"} | ALL, "ours": BEST_OF_OURS}
    for name, settings in contenders.items():
        for samples in SIZES:
            fisher = {"num_fisher_samples": min(64, samples)} if name == "ours" else {}
            label = f"{name}, {samples} sequences"
            yield Variant("Size of calibration", label, 0.4, settings | fisher, samples=samples)
        for on_prose in (False, True):
            label = f"{name}, on {'English prose' if on_prose else 'Python source'}"
            yield Variant("Domain of calibration", label, 0.4, settings, on_prose=on_prose)
    for count in (4, 16, 64):
        settings = BEST_OF_OURS | {"num_fisher_samples": count}
        yield Variant("Sequences for the Fisher information", str(count), 0.4, settings)


def measure(variant: Variant) -> Row:
    """Run the pipeline for one row; nothing is exported."""
    torch.set_num_threads(1)
    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.stages.factorize.stage import FactorizeStage
    from ercsvd_deploy.pipelines.state.progress import silent
    from ercsvd_deploy.recipe.load import TextFile

    stage = {"factorize": {**variant.settings, "compression_ratio": variant.ratio, "rank_multiple": 8}}
    point = Point(MODEL, variant.name, "parameters", (stage,), samples=variant.samples)
    recipe = quality.recipe_of(point)
    with tempfile.TemporaryDirectory() as folder:
        if variant.on_prose:
            text = Path(folder, "prose.txt")
            text.write_text(english_prose(), encoding="utf-8")
            calibration = recipe.calibration.model_copy(update={"dataset": TextFile(text=str(text))})
            recipe = recipe.model_copy(update={"calibration": calibration})
        prepared = prepare_run(recipe, None, device=torch.device("cpu"))
        if variant.layers is not None:
            stages = tuple(
                moved(stage, variant.layers) if isinstance(stage, FactorizeStage) else stage
                for stage in prepared.plan.stages
            )
            prepared = replace(prepared, plan=replace(prepared.plan, stages=stages))
        run = start_run(prepared, Path(folder))
        run.run_stages(silent)
        report = run.report()
    ranks = report.results["factorize"].chosen.plan.ranks
    return Row(variant.key, quality.excess_of(report), dict(ranks))


def english_prose() -> str:
    """Return Python's language reference without the part that is held out for judging."""
    topics = sorted(pydoc_data.topics.topics.items())
    return "\n\n\n".join(text for name, text in topics if not is_reference_held_out(name))


def moved(stages: Any, layers: Sequence[int]) -> Any:
    """Return a plan that compresses other layers than the last, as hard as it would those."""
    [plan] = stages.rank_plans.values()
    architecture = stages.architecture
    count = len(architecture.layers)
    ranks = {linear.name: None for linear in architecture.linears}
    for target, source in zip(layers, range(count - len(layers), count), strict=True):
        pairs = zip(architecture.layers[target].linears, architecture.layers[source].linears, strict=True)
        ranks |= {own.name: plan.ranks[other.name] for own, other in pairs}
    # All layers count as compressed; those without ranks stay whole.
    return replace(stages, rank_plans={count: replace(plan, ranks=ranks, num_compressed_layers=count)})


def tables(rows: Sequence[Row]) -> str:
    """Return one table for each question."""
    found = {(table, name, ratio): row.excess for row in rows for table, name, ratio in [row.key]}
    parts = []
    for table in dict.fromkeys(variant.table for variant in variants()):
        own = [variant for variant in variants() if variant.table == table]
        ratios = list(dict.fromkeys(variant.ratio for variant in own))
        cells = []
        for name in dict.fromkeys(variant.name for variant in own):
            values = [found.get((table, name, ratio)) for ratio in ratios]
            figures = [f"{value[text]:.4f}" if value else "-" for value in values for text in TEXTS]
            cells.append([name, *figures])
        columns = [f"{100 * ratio:.0f} %, {text}" for ratio in ratios for text in TEXTS]
        parts.append(f"## {table}\n\n{markdown_table([table, *columns], cells)}")
    chosen = next(
        (row.ranks for row in rows if row.key == ["Size of calibration", "ours, 64 sequences", 0.4]), {}
    )
    return "\n\n".join([*parts, f"## Ranks that error control chose at 40 %\n\n{rank_table(chosen)}"])


def rank_table(ranks: Mapping[str, int | None]) -> str:
    """Return a row for each layer and a column for each kind of matrix."""
    by_layer: dict[str, dict[str, str]] = {}
    for name, rank in ranks.items():
        layer = next(part for part in name.split(".") if part.isdigit())
        by_layer.setdefault(layer, {})[name.rpartition(".")[2]] = "whole" if rank is None else str(rank)
    kinds = list(next(iter(by_layer.values()), {}))
    return markdown_table(["layer", *kinds], [[layer, *row.values()] for layer, row in by_layer.items()])


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=3, help="processes of one thread each")
    parser.add_argument("--rows", type=Path, default=Path("out/ablations.jsonl"), help="rows measured so far")
    parser.add_argument("--name", default="ablations", help="name of the results files")
    arguments = parser.parse_args()
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if arguments.rows.exists():
        rows = [Row(**json.loads(line)) for line in arguments.rows.read_text().splitlines()]
    measured = [row.key for row in rows]
    missing = [variant for variant in variants() if variant.key not in measured]
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
        arguments.rows.open("a") as file,
    ):
        for row in pool.map(measure, missing):
            rows.append(row)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(row.key, row.excess, flush=True)
    text = f"""# Ablations

ln(perplexity / dense perplexity) of the embedded Llama (eight layers) on {WINDOWS} windows of 256 tokens
of each held-out text, by the share of decoder-Linear parameters removed. Unless a row says otherwise,
calibration is on {SAMPLES} sequences of 256 tokens of Python source, which `in_domain` is too;
`out_of_domain` is English prose. "ours" is error control with the Fisher metric on the compressed prefix, two
factors, nothing quantized.

{tables(rows)}
"""
    made_by = environment(f".venv/bin/python benchmarks/ablations.py --jobs {arguments.jobs}", threads=1)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


if __name__ == "__main__":
    main()
