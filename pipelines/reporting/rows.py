"""What a report comes to, in words and short tables: the head of the HTML page and of the model card."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ercsvd_deploy.pipelines.reporting.schema import Figures, GateResult, ReportDocument

_METHODS = {"svd": "SVD", "asvd": "ASVD", "svd_llm": "SVD-LLM", "erc_svd": "ERC-SVD"}
_GATES = {
    "perplexity_increase": "Increase of perplexity",
    "logprob_kl": "Log-prob KL",
    "final_layer_error": "Final-layer error",
    "exact_match_drop": "Loss of exact match",
    "task_drop": "Loss of accuracy",
    "max_size": "Size",
    "max_size_ratio": "Size against the original",
    "serving_parity": "Difference of vLLM's log-probs",
}
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_UNITS = ("B", "KB", "MB", "GB", "TB")
NOT_MEASURED = "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """One line of a table of before and after."""

    name: str
    original: str
    compressed: str
    change: str = ""


def model_name(report: ReportDocument) -> str:
    """Return the original model's short name."""
    path = str(_section(report.recipe, "model").get("path", "model")).rstrip("/\\")
    snapshot = _HUB_SNAPSHOT.search(path)
    return snapshot[2] if snapshot else PurePosixPath(path).name or "model"


def hub_model(report: ReportDocument) -> str | None:
    """Return the original model's name on the Hub, if the recipe took it from there.

    A local directory may look like `organisation/name` too: it is one if it is there now.
    """
    path = str(_section(report.recipe, "model").get("path", ""))
    snapshot = _HUB_SNAPSHOT.search(path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    return path if _HUB_NAME.fullmatch(path) and not Path(path).is_dir() and path[0] != "." else None


def is_vision_model(report: ReportDocument) -> bool:
    """Whether the model looks at pictures."""
    return len(report.components) > 1


def describe_treatment(report: ReportDocument) -> str:
    """Return in a sentence or two what was done to the model."""
    sentences = []
    stage = _stage(report.recipe, "factorize")
    if report.factorize is not None:
        before, after = report.original.linear_parameters, report.compressed.linear_parameters
        method = _METHODS.get(str(stage.get("method")), str(stage.get("method", "Factorization")))
        removed = f"{100 * (1 - after / before):.1f} %" if before else "some"
        where = _describe_place(report) if stage.get("allocation", "last_k") == "last_k" else ""
        sentences.append(f"{method} removed {removed} of the decoder Linears' parameters{where}.")
    if report.quantize is not None and report.quantize.matrices:
        widths = sorted({matrix.bits for matrix in report.quantize.matrices})
        groups = sorted({matrix.group_size for matrix in report.quantize.matrices})
        stored = " and ".join(f"int{width}" for width in widths)
        sizes = " and ".join("whole rows" if size < 0 else str(size) for size in groups)
        in_groups = f"in groups of {sizes}" if groups != [-1] else "by whole rows"
        sentences.append(f"GPTQ stores what is left of them as {stored}, {in_groups}.")
    trained = [
        what
        for what, recovered in (("factors", report.recover), ("scales", report.recover_quantized))
        if recovered is not None and any(layer.is_kept for layer in recovered.layers)
    ]
    if trained:
        sentences.append(
            f"{' and '.join(trained).capitalize()} were trained on the original layers' outputs."
        )
    return " ".join(sentences) or "The tensors are the original's."


def _describe_place(report: ReportDocument) -> str:
    """Return in which layers the factors are."""
    compressed = report.factorize.num_compressed_layers if report.factorize else 0
    layers = count_layers(report)
    if compressed == layers:
        return f", in all {layers} decoder layers"
    return f", in the last {compressed}" + (f" of {layers}" if layers else "") + " decoder layers"


def count_layers(report: ReportDocument) -> int | None:
    """Return how many decoder layers the model has; None if nothing in the report tells."""
    measured = [len(errors) for errors in report.change.layer_errors.values()]
    if measured:
        return max(measured)
    tried = [point.num_compressed_layers for point in report.factorize.search] if report.factorize else []
    return max(tried, default=None)


def describe_gates(gates: list[GateResult]) -> str:
    """Return the verdict of all gates together."""
    missed = sum(not gate.passed for gate in gates)
    if not gates:
        return "No gates in the recipe"
    if missed:
        return f"{missed} of {len(gates)} gates missed"
    return "Gate passed" if len(gates) == 1 else f"All {len(gates)} gates passed"


def serve_commands(report: ReportDocument, path: str) -> list[str]:
    """Return the shell lines that serve the model: the installation, and `vllm serve` with its flags.

    Args:
        report: The model's report.
        path: Where the model is.
    """
    words = ["vllm", "serve", path]
    if _section(report.recipe, "model").get("trust_remote_code"):
        words.append("--trust-remote-code")
    smallest = min(tensor_parallel_sizes(report), default=1)
    if smallest > 1:
        words += ["--tensor-parallel-size", str(smallest)]
    plugin = " ercsvd-deploy" if needs_plugin(report) else ""
    return [f"pip install 'vllm>=0.29'{plugin}", shlex.join(words)]


def needs_plugin(report: ReportDocument) -> bool:
    """Whether the export is in our own format."""
    return bool(_section(report.recipe, "export").get("format", "vllm") == "vllm")


def tensor_parallel_sizes(report: ReportDocument) -> list[int]:
    """Return the sizes for which the ranks were made to divide."""
    sizes = _section(report.recipe, "serving").get("tensor_parallel_sizes")
    return [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []


def export_path(report: ReportDocument, directory: Path) -> Path:
    """Return the export's path as the recipe has it, or where it is if it was moved or written elsewhere."""
    named = _section(report.recipe, "export").get("path")
    return Path(named) if isinstance(named, str) and Path(named).name == directory.name else directory


def size_rows(report: ReportDocument) -> list[Row]:
    """Return how large the model was and is."""
    before, after = report.original, report.compressed
    return [
        Row(
            "Size of all tensors",
            readable_bytes(before.num_bytes),
            readable_bytes(after.num_bytes),
            relative(before.num_bytes, after.num_bytes),
        ),
        Row(
            "Parameters",
            readable_count(before.parameters),
            readable_count(after.parameters),
            relative(before.parameters, after.parameters),
        ),
        Row(
            "Parameters of decoder Linears",
            readable_count(before.linear_parameters),
            readable_count(after.linear_parameters),
            relative(before.linear_parameters, after.linear_parameters),
        ),
        Row(
            "Bits per decoder weight",
            f"{before.linear_bits_per_weight:.2f}",
            f"{after.linear_bits_per_weight:.2f}",
            relative(before.linear_bits_per_weight, after.linear_bits_per_weight),
        ),
    ]


def quality_rows(report: ReportDocument) -> list[Row]:
    """Return how good the model was and is, on everything that was measured."""
    return [*_quality_rows(report.original, report.compressed), *_distance_rows(report)]


def _quality_rows(before: Figures, after: Figures) -> Iterator[Row]:
    for text, old in before.perplexity.items():
        new = after.perplexity.get(text)
        yield Row(f"Perplexity, {text}", number(old), number(new), relative(old, new))
    for name, old in before.exact_match.items():
        new = after.exact_match.get(name)
        yield Row(f"Exact match, {name}", percent(old), percent(new), points(old, new))
    for task, metrics in before.tasks.items():
        for metric, old in metrics.items():
            new = after.tasks.get(task, {}).get(metric)
            yield Row(f"{task}, {metric}", number(old, 4), number(new, 4), difference(old, new))


def _distance_rows(report: ReportDocument) -> Iterator[Row]:
    for text, found in report.change.logprob_kl.items():
        yield Row(f"Log-prob KL, {text}", "", f"{number(found, 4)} nats")
    for text, found in report.change.final_layer_error.items():
        yield Row(f"Final-layer error, {text}", "", number(found, 4))


def gate_name(gate: GateResult) -> str:
    """Return what a gate limits, and on what, for people."""
    limited = _GATES.get(gate.gate, gate.gate)
    return limited if gate.subject is None else f"{limited}, {gate.subject}"


def gate_value(gate: GateResult, value: float | None) -> str:
    """Return a gate's limit or measurement with its unit."""
    if value is None:
        return "not measured"
    if gate.gate == "max_size":
        return readable_bytes(value)
    if gate.gate in ("perplexity_increase", "max_size_ratio"):
        return f"{100 * value:.1f} %"
    if gate.gate in ("exact_match_drop", "task_drop"):
        return f"{100 * value:.1f} points"
    return f"{value:.4f} nats" if gate.gate in ("logprob_kl", "serving_parity") else f"{value:.4f}"


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: names of files may have bytes in them that are no characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def readable_bytes(size: float) -> str:
    """Return bytes in decimal units: 4.94 MB."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:#.3g}".removesuffix(".") + f" {_UNITS[unit]}" if unit else f"{size:.0f} B"


def readable_count(count: int) -> str:
    """Return a count: 1,234,567 or, where nobody counts digits any more, 7.24 billion."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e8 else f"{count:,}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measured number, or a dash."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def relative(before: float | None, after: float | None) -> str:
    """Return the relative change."""
    if not before or after is None:
        return ""
    return signed(100 * (after / before - 1), ".1f") + " %"


def points(before: float | None, after: float | None) -> str:
    """Return the change of a share in percentage points."""
    return "" if before is None or after is None else signed(100 * (after - before), ".1f") + " points"


def difference(before: float | None, after: float | None) -> str:
    """Return the change of a plain number."""
    return "" if before is None or after is None else signed(after - before, ".4f")


def signed(value: float, form: str) -> str:
    """Return a number with its sign, the minus as wide as the plus."""
    return f"{value:+{form}}".replace("-", "\N{MINUS SIGN}")


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def _stage(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    stages = recipe.get("stages")
    listed = stages if isinstance(stages, list) else []
    return next((_section(stage, name) for stage in listed if isinstance(stage, dict) and name in stage), {})
