"""What compression costs: ln(perplexity / dense) of every method, at equal parameters and at equal bits.

Two embedded models of different shapes, two texts each (calibration is Python source, as `in_domain`), every
row one run of the pipeline. Beside the published methods stand plain GPTQ at 4 and 8 bits, by the pipeline,
and at 3 and 2 bits, which the pipeline does not write, by a textbook implementation below.

    python benchmarks/quality.py --jobs 3

Rows are kept in a file of JSON lines as they are measured; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many small models run side by side

import torch
from results_file import environment, markdown_table, write_results
from safetensors.torch import save_file

MODELS = {"tiny-llama": "examples/tiny-llama", "tiny-qwen2": "examples/tiny-qwen2"}
TEXTS = ("in_domain", "out_of_domain")
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)
BITS = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
SAMPLES = 64  # of 256 tokens, for calibration
WINDOWS = 96  # of 256 tokens, of each text

OURS: dict[str, Any] = {
    "method": "svd_llm",
    "output_metric": "fisher",
    "allocation": "error_controlled",
    "num_fisher_samples": 64,
}
OURS_BY_LAYOUT = {"ours, two factors": OURS, "ours, pivoted": OURS | {"layout": "pivoted"}}
PREFIX = {"compressed_prefix_inputs": True}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "num_compressed_layers": "all"},
    "asvd": {"method": "asvd", "num_compressed_layers": "all"},
    "svd_llm": {"method": "svd_llm", "num_compressed_layers": "all"},
    "erc_svd, best k": {"method": "erc_svd", "num_compressed_layers": "auto"},
    "svd_llm, prefix": {
        "method": "svd_llm",
        "num_compressed_layers": "all",
        "compressed_prefix_inputs": True,
    },
    "erc_svd, best k, prefix": {
        "method": "erc_svd",
        "num_compressed_layers": "auto",
        "compressed_prefix_inputs": True,
    },
    "erc_svd, best k, beta auto": {"method": "erc_svd", "num_compressed_layers": "auto", "beta": "auto"},
    "Fisher metric alone": {"method": "svd_llm", "output_metric": "fisher", "allocation": "uniform"},
    "error control alone": {"method": "svd_llm", "allocation": "error_controlled"},
    "pivoted alone": {"method": "svd_llm", "layout": "pivoted", "allocation": "uniform"},
    **OURS_BY_LAYOUT,
    **{f"{name}, prefix": settings | PREFIX for name, settings in OURS_BY_LAYOUT.items()},
}
# Recovery trains on more sequences than a Gram needs: each of these is seen about once.
RECOVERIES: dict[str, dict[str, Any]] = {
    "recovered": {"recover": {"steps": 256, "batch_size": 4}},
    "recovered, tokens replaced": {"recover": {"steps": 256, "batch_size": 4, "replaced_tokens": 0.3}},
    "recovered longer": {"recover": {"steps": 1024, "batch_size": 4}},
    "recovered longer, tokens replaced": {
        "recover": {"steps": 1024, "batch_size": 4, "replaced_tokens": 0.3}
    },
}
RECOVERY_SAMPLES = 1000


@dataclass(frozen=True)
class Point:
    """One row to measure."""

    model: str
    name: str
    table: str  # "parameters" or "bits"
    stages: tuple[dict[str, Any], ...]
    target: dict[str, Any] | None = None
    textbook_bits: tuple[int, int] | None = None  # bits and group size of the textbook's GPTQ
    samples: int = SAMPLES

    @property
    def label(self) -> str:
        """The name, told apart from that of another target."""
        return self.name if self.target is None else f"{self.name}, {self.target['overall_bits']:g} asked"


@dataclass(frozen=True)
class Row:
    """What was measured."""

    model: str
    name: str
    table: str
    removed: float
    bits: float
    excess: dict[str, float]  # ln(perplexity / dense) on each text
    logprob_kl: dict[str, float]


def points() -> list[Point]:
    """Return everything to measure."""
    return [
        point for model in MODELS for points_of in (_in_parameters, _in_bits) for point in points_of(model)
    ]


def _in_parameters(model: str) -> Iterator[Point]:
    for ratio in RATIOS:
        for name, settings in METHODS.items():
            stage = {"factorize": {**settings, "compression_ratio": ratio, "rank_multiple": 8}}
            yield Point(model, f"{name}|{ratio}", "parameters", (stage,))
        for name, settings in OURS_BY_LAYOUT.items():
            stage = {"factorize": settings | PREFIX | {"compression_ratio": ratio, "rank_multiple": 8}}
            for way, recover in RECOVERIES.items():
                label, stages = f"{name}, prefix, {way}|{ratio}", (stage, recover)
                yield Point(model, label, "parameters", stages, samples=RECOVERY_SAMPLES)


def _in_bits(model: str) -> Iterator[Point]:
    for bits, group in ((4, 32), (4, 64), (8, 64)):
        stage = {"quantize": {"bits": bits, "group_size": group}}
        yield Point(model, f"plain GPTQ-{bits}, groups of {group}", "bits", (stage,))
    for bits, group in ((3, 64), (2, 64)):
        name = f"plain GPTQ-{bits}, groups of {group} (textbook)"
        yield Point(model, name, "bits", (), None, (bits, group))
    quantize = {"quantize": {"bits": 4, "group_size": 64}}
    for ratio in (0.2, 0.4):
        for method in ("svd_llm", "erc_svd"):
            settings = {"method": method, "compression_ratio": ratio, "rank_multiple": 32}
            stages = ({"factorize": settings}, {"quantize": {"bits": 4, "group_size": 32}})
            yield Point(model, f"{method}, best k, {100 * ratio:.0f} % removed", "bits", stages)
    for bits in BITS:
        target = {"overall_bits": bits, "group_sizes": [32, 64]}
        for layout in ("low_rank", "pivoted"):
            stages = ({"factorize": OURS | {"rank_multiple": 32, "layout": layout}}, quantize)
            yield Point(model, f"ours, {layout}", "bits", stages, target)
        stage = {"factorize": OURS | PREFIX | {"rank_multiple": 32}}
        yield Point(model, "ours, low_rank, prefix", "bits", (stage, quantize), target)
        for way, recover in RECOVERIES.items():
            name, stages = f"ours, low_rank, prefix, {way}", (stage, quantize, recover)
            yield Point(model, name, "bits", stages, target, samples=RECOVERY_SAMPLES)
    for way, recover in RECOVERIES.items():
        name, stages = f"plain GPTQ-4, groups of 64; {way}", (quantize, recover)
        yield Point(model, name, "bits", stages, samples=RECOVERY_SAMPLES)


def measure(point: Point, shared: Path | None = None) -> Row:
    """Run the pipeline for one row; nothing is exported, and stages in `shared` are not repeated."""
    torch.set_num_threads(1)
    from ercsvd_deploy.pipelines.flow import prepare_run, start_run
    from ercsvd_deploy.pipelines.state.progress import silent

    recipe = recipe_of(point)
    prepared = prepare_run(recipe, None, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as work:
        if point.textbook_bits is not None:
            return _measure_textbook(point, prepared, Path(work))
        run = start_run(prepared, Path(work), shared)
        run.run_stages(silent)
        report = run.report()
    excess = {
        text: math.log(report.compressed.perplexity[text] / report.original.perplexity[text])
        for text in TEXTS
    }
    removed = 1 - report.compressed.linear_parameters / report.original.linear_parameters
    divergence = {text: report.change.logprob_kl[text] for text in TEXTS}
    bits = report.compressed.linear_bits_per_weight
    return Row(point.model, point.label, point.table, removed, bits, excess, divergence)


def excess_of(report: Any) -> dict[str, float]:
    """Return ln(perplexity / dense) on each text."""
    return {
        text: math.log(report.compressed.perplexity[text] / report.original.perplexity[text])
        for text in TEXTS
    }


def recipe_of(point: Point) -> Any:
    """Return the recipe of a row, without an export."""
    import yaml

    from ercsvd_deploy.recipe.load import load_recipe

    recipe: dict[str, Any] = {
        "model": {"path": MODELS[point.model], "dtype": "bfloat16"},
        "calibration": {
            "dataset": {"text": "examples/text/calibration.txt"},
            "num_samples": point.samples,
            "sequence_length": 256,
            "seed": 3,
        },
        "stages": list(point.stages) or [{"quantize": {"bits": 4, "group_size": 64}}],
        "evaluation": {
            "perplexity": {text: f"examples/text/{text}.txt" for text in TEXTS},
            "max_sequences": WINDOWS,
        },
    }
    if point.target is not None:
        recipe["target"] = point.target
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe))
        return load_recipe(file)


def _measure_textbook(point: Point, prepared: Any, work: Path) -> Row:
    """Quantize all decoder Linears by textbook GPTQ, layer by layer on the quantized prefix."""
    from ercsvd_deploy.evaluation.comparison import compare_models
    from ercsvd_deploy.format.files.store_views import OverlayStore
    from ercsvd_deploy.format.files.tensor_store import FileStore
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.pipelines.inputs.model import stream

    assert point.textbook_bits is not None
    bits, group = point.textbook_bits
    model = prepared.original
    batches = model.batches(prepared.data.samples)
    hidden = model.embed(batches)
    weights = {}
    for layer in model.architecture.layers:
        statistics = model.input_statistics(layer)
        with model.layer(layer.index) as module:
            model.advance(layer.index, batches, list(hidden), observe=statistics, module=module)
            for linears in layer.groups:
                gram = statistics[layer.local_name(linears[0])].gram
                for linear in linears:
                    found = module.get_submodule(layer.local_name(linear))
                    found.weight.data = textbook_gptq(found.weight.data, gram, bits, group)
                    weights[f"{linear.name}.weight"] = found.weight.data
            model.advance(layer.index, batches, hidden, module=module)
    save_file(weights, work / "weights.safetensors")
    dense = {
        linear.name: Storage(layout="dense", shape=(linear.out_features, linear.in_features))
        for linear in model.architecture.linears
    }
    store = OverlayStore(model.store, FileStore([work / "weights.safetensors"]), dense)
    quantized = stream(prepared.opened, prepared.device, store)
    found = compare_models(model, quantized, prepared.data.texts, {})
    excess = {
        text: math.log(found.compressed.perplexity[text].value / found.original.perplexity[text].value)
        for text in TEXTS
    }
    divergence = {text: found.change.logprob_kl[text] for text in TEXTS}
    return Row(point.model, point.label, point.table, 0.0, bits + 16 / group, excess, divergence)


def textbook_gptq(weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return a weight [out, in] rounded by GPTQ (arXiv 2210.17323), columns of large activation first.

    Symmetric grid of 2^bits levels between the extremes of each group, scales from the original columns.
    """
    out_features, in_features = weight.shape
    order = torch.argsort(gram.diagonal(), descending=True)
    groups = weight.view(out_features, in_features // group, group)
    scales = groups.abs().amax(2).clamp(min=1e-8) / (2 ** (bits - 1) - 0.5)
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(in_features, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True).float()
    left = weight[:, order].clone()
    rounded = torch.empty_like(left)
    for column, source in enumerate(order.tolist()):
        scale = scales[:, source // group]
        level = (left[:, column] / scale - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rounded[:, column] = (level + 0.5) * scale
        error = (left[:, column] - rounded[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return rounded[:, torch.argsort(order)]


def by_parameters(rows: Sequence[Row], model: str, text: str) -> str:
    """Return the table at equal parameters of one model and text; "-" is not measured."""
    cells = []
    known = dict.fromkeys(point.name.partition("|")[0] for point in points())
    for name in known:
        own = {row.name.partition("|")[2]: row for row in rows if row.name.startswith(f"{name}|")}
        found = [own.get(str(ratio)) for ratio in RATIOS]
        if own:
            cells.append([name, *("-" if row is None else f"{row.excess[text]:.4f}" for row in found)])
    by_name = {row[0]: row[1:] for row in cells}
    published = by_name.get("erc_svd, best k")
    for name in (name for name in by_name if name.startswith("ours")):
        if published is not None and name in by_name:
            pairs = zip(by_name[name], published, strict=True)
            shares = ["-" if "-" in (a, b) else f"{float(a) / float(b):.2f}" for a, b in pairs]
            cells.append([f"{name} / erc_svd", *shares])
    columns = [f"{model}, {text}", *(f"{100 * ratio:.0f} % removed" for ratio in RATIOS)]
    return markdown_table(columns, cells)


def by_bits(rows: Sequence[Row], model: str) -> str:
    """Return the table at equal bits of one model, with the distance from plain GPTQ's line."""
    ordered = sorted(rows, key=lambda row: (row.bits, row.name))
    cells = []
    for row in ordered:
        line = {text: plain_line(rows, row.bits, text) for text in TEXTS}
        against = [
            "" if is_plain(row) or line[text] is None else f"{row.excess[text] - line[text]:+.4f}"  # type: ignore[operator]
            for text in TEXTS
        ]
        cells.append([row.name, f"{row.bits:.2f}", *(f"{row.excess[text]:.4f}" for text in TEXTS), *against])
    columns = [model, "bits per weight", *TEXTS, *(f"{text}, to the plain line" for text in TEXTS)]
    return markdown_table(columns, cells)


def is_plain(row: Row) -> bool:
    """Whether a row is GPTQ alone, of which the line is made."""
    return row.name.startswith("plain") and "recovered" not in row.name


def plain_line(rows: Sequence[Row], bits: float, text: str) -> float | None:
    """Return what plain GPTQ would lose at so many bits: straight between its neighbours."""
    plain = sorted((row.bits, row.excess[text]) for row in rows if is_plain(row))
    below = [each for each in plain if each[0] <= bits]
    above = [each for each in plain if each[0] >= bits]
    if not below or not above:
        return None
    (low, at_low), (high, at_high) = below[-1], above[0]
    share = (bits - low) / (high - low) if high > low else 0.0
    return at_low + share * (at_high - at_low)


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=3, help="processes of one thread each")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=Path, default=Path("out/quality.jsonl"), help="rows measured so far")
    parser.add_argument("--name", default="quality", help="name of the results files")
    arguments = parser.parse_args()
    rows = []
    if arguments.rows.exists():
        rows = [Row(**json.loads(line)) for line in arguments.rows.read_text().splitlines()]
    measured = {(row.model, row.table, row.name) for row in rows}
    wanted = [point for point in points() if point.model in arguments.models]
    missing = [point for point in wanted if (point.model, point.table, point.label) not in measured]
    with (
        tempfile.TemporaryDirectory() as shared,
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
        arguments.rows.open("a") as file,
    ):
        for row in pool.map(partial(measure, shared=Path(shared)), missing):
            rows.append(row)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(row, flush=True)
    parts = []
    for model in arguments.models:
        own = [row for row in rows if row.model == model]
        equal = [row for row in own if row.table == "parameters"]
        parts.append(f"## {model}, at equal parameters")
        parts += [by_parameters(equal, model, text) for text in TEXTS]
        parts.append(f"## {model}, at equal bits")
        parts.append(by_bits([row for row in own if row.table == "bits"], model))
    text = f"""# What compression costs

ln(perplexity / dense perplexity) on {WINDOWS} windows of 256 tokens of each held-out text; calibration on
{SAMPLES} sequences of Python source. "ours" is `method: svd_llm, output_metric: fisher, allocation:
error_controlled`, "prefix" with `compressed_prefix_inputs`, "recovered" with a recover stage of 256 steps of
4 sequences and everything calibrated on {RECOVERY_SAMPLES} sequences, "longer" with 1024 steps, "tokens
replaced" with `replaced_tokens: 0.3` in that stage. Where
bits are compared there is a `target`, and factors are int4; scales count as bits, embeddings do not.
"textbook" is GPTQ by a plain implementation in this benchmark, since the pipeline wrote 4 and 8 bits then;
its levels lie half a step beside zero, which whole zero points cannot express. vLLM has kernels for 2- and
3-bit weights on NVIDIA GPUs from compute capability 7.5, and none on CPUs and AMD GPUs
(docs/decisions/0004-integers-through-vllms-kernels.md).

{chr(10).join(f"{part}{chr(10)}" for part in parts)}"""
    made_by = environment(f".venv/bin/python benchmarks/quality.py --jobs {arguments.jobs}", threads=1)
    write_results(arguments.name, made_by=made_by, figures=[asdict(row) for row in rows], text=text)


if __name__ == "__main__":
    main()
