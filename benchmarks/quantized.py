"""Perplexity against bytes on the embedded model: low rank plus int4 beside plain GPTQ.

    .venv/bin/python benchmarks/quantized.py

Two tables. The first has the dense model, GPTQ-4 and GPTQ-8 of the dense model, and SVD-LLM and ERC-SVD at 20
and 40 % removed with int4 factors, each with rounding to nearest beside it. The second ablates the order in
which factors are quantized: their rotation, the re-fit of the second factor, inputs on the compressed prefix.
Writes `benchmarks/results/quantized.json` and `.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from methods import Workbench
from results_file import environment, markdown_table, write_results

from ercsvd_deploy.evaluation.quality import perplexities
from ercsvd_deploy.format.files.store_views import OverlayStore
from ercsvd_deploy.format.files.tensor_store import FileStore, TensorStore
from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
from ercsvd_deploy.pipelines.stages.factorize.ranks.last_layers import LastLayers
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import rank_plans
from ercsvd_deploy.pipelines.stages.factorize.walk import factorize_decoder
from ercsvd_deploy.pipelines.stages.quantize.decoder import quantize_decoder
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import quantize_plan_of
from ercsvd_deploy.pipelines.stages.sizes import linear_bits_per_weight, stored_bytes, sum_by_part
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.load import load_recipe

RECIPE = Path("recipes/demo.yaml")
GROUP_SIZE = 32


@dataclass(frozen=True)
class Result:
    """One stored model."""

    name: str
    quantization: str  # none, gptq-4, rtn-4, ...
    num_bytes: int
    linear_bits_per_weight: float
    perplexity: Mapping[str, float]


@dataclass(frozen=True)
class Stored:
    """A model as stages have left it, its files included."""

    store: TensorStore
    modules: dict[str, Storage]
    ranks: Mapping[str, int | None]


class QuantizationBench(Workbench):
    """The shared model and texts, with factorized models kept for several quantizations."""

    def factorized(self, method: str, ratio: float, directory: Path) -> Stored:
        """Factorize once, ranks fitting the integer groups."""
        recipe = self._recipe(method, ratio, "auto", 0.05, "weight")
        assert recipe.factorize is not None, "the demo recipe factorizes"
        plans = rank_plans(recipe, self.model.architecture, self.model.dtype.itemsize)
        directory.mkdir()
        work = Factorization(self.model, self.samples, recipe.factorize, CacheFolder(directory))
        outcome = factorize_decoder(work, LastLayers(work, plans))
        store = OverlayStore(self.model.store, FileStore(outcome.files), outcome.modules)
        return Stored(store, outcome.modules, outcome.plan.ranks)

    def quantize(self, start: Stored, directory: Path, **settings: object) -> Stored:
        """Quantize the whole decoder."""
        options = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())
        stage = f"stages=[{{quantize: {{group_size: {GROUP_SIZE}, {options}}}}}]"
        recipe = load_recipe(RECIPE, [*self.overrides, stage])
        assert recipe.quantize is not None, "the override asks for it"
        plan = quantize_plan_of(recipe, self.model.architecture)
        described = plan.describe(start.ranks, self.model.architecture)
        directory.mkdir()
        model = self.compressed(start.store, CheckpointConfig(modules=start.modules))
        outcome = quantize_decoder(
            model,
            self.model.store,
            self.samples,
            recipe.quantize,
            described,
            plan.matches,
            CacheFolder(directory),
        )
        return Stored(OverlayStore(start.store, FileStore(outcome.files), described), described, start.ranks)

    def measure(self, name: str, quantization: str, stored: Stored) -> Result:
        """Evaluate and weigh."""
        model = self.compressed(stored.store, CheckpointConfig(modules=stored.modules))
        architecture = self.model.architecture
        by_part = sum_by_part(stored_bytes(stored.store), architecture)
        result = Result(
            name,
            quantization,
            sum(by_part.values()),
            linear_bits_per_weight(by_part, architecture),
            {text: found.value for text, found in perplexities(model, self.texts).items()},
        )
        print(result, flush=True)
        return result


def compare(bench: QuantizationBench, work: Path) -> tuple[list[Result], list[Result]]:
    """Return the rows of both tables."""
    dense = Stored(bench.model.store, {}, {})
    rows = [bench.measure("dense", "none", dense)]
    ablation = []
    for bits in (8, 4):
        for method in ("gptq", "rtn"):
            made = bench.quantize(dense, work / f"dense-{method}-{bits}", bits=bits, method=method)
            rows.append(bench.measure("dense", f"{method}-{bits}", made))
    for ratio in (0.2, 0.4):
        for method in ("svd_llm", "erc_svd"):
            name = f"{method}, {100 * ratio:.0f} % removed"
            start = bench.factorized(method, ratio, work / f"{method}-{ratio}")
            rows.append(bench.measure(name, "none", start))
            for rounding in ("gptq", "rtn"):
                made = bench.quantize(start, work / f"{method}-{ratio}-{rounding}", bits=4, method=rounding)
                rows.append(bench.measure(name, f"{rounding}-4", made))
            if method == "erc_svd":
                ablation.append(rows[-2])
                for switches in (
                    {"rotate_factors": False},
                    {"refit_second_factor": False},
                    {"compressed_prefix_inputs": False},
                    {"refit_second_factor": False, "compressed_prefix_inputs": False},
                ):
                    label = ", ".join(f"{key}: false" for key in switches)
                    made = bench.quantize(start, work / f"{ratio}-{len(ablation)}", bits=4, **switches)
                    ablation.append(bench.measure(name, f"gptq-4, {label}", made))
    return rows, ablation


def verdict(rows: Sequence[Result], text: str) -> list[str]:
    """Say for every low-rank int4 model where it stands against plain GPTQ."""
    plain = next(row for row in rows if row.name == "dense" and row.quantization == "gptq-4")
    lines = []
    for row in rows:
        if row.name != "dense" and row.quantization == "gptq-4":
            better = row.perplexity[text] <= plain.perplexity[text]
            smaller = row.num_bytes <= plain.num_bytes
            says = (
                "smaller and better than plain GPTQ-4"
                if better and smaller
                else "larger and worse: plain GPTQ-4 wins"
                if not better and not smaller
                else f"{row.num_bytes / plain.num_bytes - 1:+.1%} bytes, "
                f"{row.perplexity[text] / plain.perplexity[text] - 1:+.1%} perplexity against plain GPTQ-4"
            )
            lines.append(f"- {row.name}, int4 ({row.linear_bits_per_weight:.2f} bits), {text}: {says}.")
    return lines


def table(rows: Sequence[Result], dense: Mapping[str, float]) -> str:
    """Return a Markdown table of results."""
    columns = ["model", "quantization", "bytes", "bits per decoder weight", *dense]
    cells = [
        [
            row.name,
            row.quantization,
            f"{row.num_bytes:,}",
            f"{row.linear_bits_per_weight:.2f}",
            *(
                f"{value:.3f} ({100 * (value / dense[text] - 1):+.1f} %)"
                for text, value in row.perplexity.items()
            ),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="quantized", help="name of the results files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override the recipe"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = QuantizationBench(arguments.set)
    with tempfile.TemporaryDirectory() as work:
        rows, ablation = compare(bench, Path(work))
    said = "\n".join(line for text in bench.dense for line in verdict(rows, text))
    text = f"""# Low rank plus int4 against plain GPTQ on the embedded model

Perplexity on held-out text; group size {GROUP_SIZE}, symmetric; k chosen by the search. "rtn" is rounding to
nearest in place of GPTQ.

{table(rows, bench.dense)}

{said}

## The order in which factors are quantized

`gptq-4` re-fits the second factor to the original weight given the quantized first, and measures each layer's
inputs on the compressed prefix, after turning the factors within their rank dimension; the other rows switch
these off.

{table(ablation, bench.dense)}
"""
    figures = {"rows": [asdict(row) for row in rows], "ablation": [asdict(row) for row in ablation]}
    made_by = environment(".venv/bin/python benchmarks/quantized.py", threads=arguments.threads)
    write_results(arguments.name, made_by=made_by, figures=figures, text=text)


if __name__ == "__main__":
    main()
