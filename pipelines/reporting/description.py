"""A report in words: the model's names, a summary of its treatment, the verdict, and how to serve it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.format.stock_formats import STOCK_FORMATS
from ercsvd_deploy.installation import SERVED_BY, install_command

if TYPE_CHECKING:
    from ercsvd_deploy.format.stock_formats import StockFormat
    from ercsvd_deploy.pipelines.judging.gates import GateResult
    from ercsvd_deploy.pipelines.reporting.report.document import Report
    from ercsvd_deploy.pipelines.stages.factorize.outcome import Factorized
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizeOutcome
    from ercsvd_deploy.pipelines.stages.recover.results import RecoverOutcome

_METHODS = {"svd": "SVD", "asvd": "ASVD", "svd_llm": "SVD-LLM", "erc_svd": "ERC-SVD"}
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_name(report: Report) -> str:
    """Return the original model's short name."""
    path = str(_section(report.recipe, "model").get("path", "model")).rstrip("/\\")
    snapshot = _HUB_SNAPSHOT.search(path)
    return snapshot[2] if snapshot else PurePosixPath(path).name or "model"


def hub_model(report: Report) -> str | None:
    """Return the original model's name on the Hub, if the recipe took it from there.

    A local directory may look like `organisation/name` too: a path that exists counts as local.
    """
    path = str(_section(report.recipe, "model").get("path", ""))
    snapshot = _HUB_SNAPSHOT.search(path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    return path if _HUB_NAME.fullmatch(path) and not Path(path).is_dir() and path[0] != "." else None


def is_vision_model(report: Report) -> bool:
    """Whether the model reads images."""
    return len(report.components) > 1


def hub_kind(report: Report) -> tuple[str, str]:
    """Return the hub's `pipeline_tag` of such models, and transformers' class that loads one."""
    if report.task == "embed":
        return "feature-extraction", "AutoModel"
    if report.task == "classify":
        return "text-classification", "AutoModelForSequenceClassification"
    if is_vision_model(report):
        return "image-text-to-text", "AutoModelForImageTextToText"
    return "text-generation", "AutoModelForCausalLM"


def describe_treatment(report: Report) -> str:
    """Return in a sentence or two what was done to the model."""
    sentences = [*_factorization(report), *_quantization(report), *_recovery(report)]
    return " ".join(sentences) or "The tensors are the original's."


def _factorization(report: Report) -> Iterator[str]:
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is None or not factorized.linears:
        return
    settings = _stage(report.recipe, "factorize")
    original, remaining = report.original.linear_parameters, report.compressed.linear_parameters
    method = _METHODS.get(str(settings.get("method")), str(settings.get("method", "Factorization")))
    removed = f"{100 * (1 - remaining / original):.1f} %" if original else "some"
    is_last_k = settings.get("allocation", "last_k") == "last_k"
    where = _place(factorized.num_compressed_layers, count_layers(report)) if is_last_k else ""
    yield f"{method} removed {removed} of the decoder Linears' parameters{where}."


def _place(compressed: int, layers: int | None) -> str:
    """Return the phrase that says which decoder layers are factorized."""
    if compressed == layers:
        return f", in all {layers} decoder layers"
    return f", in the last {compressed}" + (f" of {layers}" if layers else "") + " decoder layers"


def _quantization(report: Report) -> Iterator[str]:
    quantized: QuantizeOutcome | None = report.stages.get("quantize")
    if quantized is None or not quantized.matrices:
        return
    matrices = [matrix for matrix in quantized.matrices if matrix.name != quantized.output_layer]
    widths = sorted({matrix.bits for matrix in matrices})
    groups = sorted({matrix.group_size for matrix in matrices})
    integer_types = " and ".join(f"int{width}" for width in widths)
    sizes = " and ".join("whole rows" if size < 0 else str(size) for size in groups)
    in_groups = f"in groups of {sizes}" if groups != [-1] else "by whole rows"
    verb = f"{rounding_method(report)} stores"
    factorized: Factorized | None = report.stages.get("factorize")
    is_factorized = factorized is not None and bool(factorized.linears)
    subject = "what is left of them" if is_factorized else "the decoder Linears"
    choice = ", chosen for each by its predicted damage" if factorized and not is_factorized else ""
    yield f"{verb} {subject} as {integer_types}, {in_groups}{choice}."
    corrections = [linear.correction for linear in quantized.linears if linear.correction is not None]
    if corrections:
        ranks = sorted({correction.rank for correction in corrections})
        of_rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield f"Low-rank corrections of rank {of_rank} correct the integers of {len(corrections)} Linears."
    yield from _vocabulary(quantized)


def _vocabulary(quantized: QuantizeOutcome) -> Iterator[str]:
    """Yield a sentence each for a quantized input embedding and a quantized output layer."""
    embedding = quantized.embedding
    bits_of = {matrix.name: matrix.bits for matrix in quantized.matrices}
    output_bits = None if quantized.output_layer is None else bits_of[quantized.output_layer]
    if embedding is not None and embedding.name == quantized.output_layer:
        yield f"Input embedding and output layer, which are one matrix, are stored as int{output_bits}."
        return
    if output_bits is not None:
        yield f"The output layer is stored as int{output_bits}."
    if embedding is not None:
        yield f"The input embedding is stored as int{embedding.bits}."


def rounding_method(report: Report) -> str | None:
    """Return the quantization method, GPTQ or rounding to nearest; None without integers.

    GPTQ counts as GPTQ even where rounding to nearest loses less on single matrices and is kept there.
    """
    quantized: QuantizeOutcome | None = report.stages.get("quantize")
    if quantized is None or not quantized.matrices:
        return None
    methods = {matrix.method for matrix in quantized.matrices}
    return "Rounding to nearest" if methods == {"rtn"} else "GPTQ"


def _recovery(report: Report) -> Iterator[str]:
    trained = []
    for stage, parameters in (("recover", "factors"), ("recover_quantized", "scales")):
        recovered: RecoverOutcome | None = report.stages.get(stage)
        if recovered is not None and any(layer.is_kept for layer in recovered.layers):
            trained.append(parameters)
            if any(layer.changed_levels for layer in recovered.layers):
                trained.append("the rounding of integers")
    if trained:
        yield f"{' and '.join(trained).capitalize()} were trained on the original layers' outputs."


def count_layers(report: Report) -> int | None:
    """Return the number of decoder layers; None if the report does not contain it."""
    measured_layers = [len(errors) for errors in report.change.layer_errors.values()]
    if measured_layers:
        return max(measured_layers)
    factorized: Factorized | None = report.stages.get("factorize")
    tried_layers = [point.num_compressed_layers for point in factorized.search] if factorized else []
    return max(tried_layers, default=None)


def describe_gates(gates: Sequence[GateResult]) -> str:
    """Return the verdict of all gates together."""
    if not gates:
        return "No gates in the recipe"
    counts = Counter(gate.verdict for gate in gates)
    if counts["passed"] == len(gates):
        return "Gate passed" if len(gates) == 1 else f"All {len(gates)} gates passed"
    undecided = counts["undecided"]
    if not counts["missed"]:
        return f"{undecided} of {len(gates)} gates undecided"
    return f"{counts['missed']} of {len(gates)} gates missed" + (
        f", {undecided} undecided" if undecided else ""
    )


def serve_commands(report: Report, path: str) -> list[str]:
    """Return the shell lines that serve the model: the installation, and `vllm serve` with its flags.

    Args:
        report: The model's report.
        path: The model's directory.
    """
    words = ["vllm", "serve", path]
    if report.task != "generate":
        words += ["--runner", "pooling"]
    if _section(report.recipe, "model").get("trust_remote_code"):
        words.append("--trust-remote-code")
    smallest = min(tensor_parallel_sizes(report), default=1)
    if smallest > 1:
        words += ["--tensor-parallel-size", str(smallest)]
    install = install_command(beside=SERVED_BY) if needs_plugin(report) else f"pip install '{SERVED_BY}'"
    return [install, shlex.join(words)]


def needs_plugin(report: Report) -> bool:
    """Whether the export is in our own format."""
    return stock_format(report) is None


def stock_format(report: Report) -> StockFormat | None:
    """Return the format of the export that vLLM reads without this package; None: it is our own."""
    return STOCK_FORMATS.get(_section(report.recipe, "export").get("format", "vllm"))


def tensor_parallel_sizes(report: Report) -> list[int]:
    """Return the tensor-parallel sizes that the recipe asks the ranks to divide by."""
    sizes = _section(report.recipe, "serving").get("tensor_parallel_sizes")
    return [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []


def export_path(report: Report, directory: Path) -> Path:
    """Return the recipe's export path; the directory itself if the export was moved or written elsewhere."""
    named = _section(report.recipe, "export").get("path")
    return Path(named) if isinstance(named, str) and Path(named).name == directory.name else directory


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


def _stage(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    stages = recipe.get("stages")
    listed = stages if isinstance(stages, list) else []
    return next((_section(stage, name) for stage in listed if isinstance(stage, dict) and name in stage), {})
