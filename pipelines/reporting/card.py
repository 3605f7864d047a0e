"""The model card of an export: its README.md, from the report and what the original's own card says.

It needs no extra library and contains nothing that differs between two runs of one recipe, so the card is
byte-identical between them. Names chosen by users or models are escaped: none of them is Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from ercsvd_deploy.format.files.sidecars import licences
from ercsvd_deploy.installation import install_command, where_from
from ercsvd_deploy.pipelines.reporting.description import (
    describe_treatment,
    export_path,
    hub_kind,
    hub_model,
    is_vision_model,
    model_name,
    needs_plugin,
    rounding_method,
    serve_commands,
    stock_format,
    tensor_parallel_sizes,
)
from ercsvd_deploy.pipelines.reporting.numbers import encodable
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report
from ercsvd_deploy.pipelines.reporting.rows import Row, gate_rows, quality_rows, size_rows
from ercsvd_deploy.pipelines.reporting.tables import report_tables
from ercsvd_deploy.pipelines.stages.export import ORIGINAL_CARD_FILE

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.contract import Table
    from ercsvd_deploy.pipelines.stages.factorize.outcome import Factorized
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizeOutcome

_LICENSE_KEYS = ("license", "license_name", "license_link")
_CARRIED_OVER = (*_LICENSE_KEYS, "language")  # of the original card's front matter
_LARGEST_CARD = 4 << 20  # bytes; larger ones are not read
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_INTERVALS = (
    "In brackets 95 % intervals; that of a change is of both models on the same windows, questions or "
    "documents."
)
_MARKUP = re.compile(r"([\\`*_\[\]#|~$&<>])")
_BREAKS = re.compile(r"\s+")


def make_card(report: Report, directory: Path, target: Path | None = None) -> str:
    """Return the model card.

    Args:
        report: The model's report.
        directory: The export; the original's card and licence files in it are read.
        target: Where the export will be, if that is somewhere else.
    """
    path = export_path(report, target or directory)
    sections = [
        _front_matter(report, directory),
        f"# {escaped(path.name or model_name(report))}\n",
        f"{escaped(model_name(report))}, compressed with ercsvd-deploy. "
        f"{escaped(describe_treatment(report))}\n",
        _figures(report),
        _stages(report),
        _serving(report, path),
        _loading(report, path),
        _making(report),
        _limits(report),
        _licence(directory),
    ]
    return encodable("\n".join(filter(None, sections)))


def escaped(text: str) -> str:
    """Return text escaped so that Markdown shows it verbatim, on one line."""
    marked = _MARKUP.sub(r"\\\1", _BREAKS.sub(" ", text))
    # Not every renderer takes backslashes before these, and GitHub makes links of bare addresses.
    return marked.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("://", "&#58;//")


def fenced(text: str, language: str = "") -> str:
    """Return a Markdown code block; its fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _front_matter(report: Report, directory: Path) -> str:
    tags = ["ercsvd", "vllm", "compressed"]
    factorized: Factorized | None = report.stages.get("factorize")
    if factorized is not None and factorized.linears:
        tags += ["low-rank", "svd"]
    quantized: QuantizeOutcome | None = report.stages.get("quantize")
    if quantized is not None:
        tags += ["gptq"] if rounding_method(report) == "GPTQ" else ["rtn"]
        tags += sorted({f"int{matrix.bits}" for matrix in quantized.matrices})
    if is_vision_model(report):
        tags.append("multimodal")
    fields: dict[str, Any] = {}
    base = hub_model(report)
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    fields |= _carried_over(directory)
    fields |= {
        "library_name": "transformers",
        "pipeline_tag": hub_kind(report)[0],
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _carried_over(directory: Path) -> dict[str, Any]:
    """Return licence and language from the original's card, else from its files."""
    card = _read_front_matter(directory / ORIGINAL_CARD_FILE)
    carried = {key: card[key] for key in _CARRIED_OVER if _is_plain(card.get(key))}
    if "license" in carried:
        return carried
    carried = {key: value for key, value in carried.items() if key not in _LICENSE_KEYS}
    files = licences(directory)
    return carried | ({"license": "other", "license_link": files[0]} if files else {})


def _read_front_matter(path: Path) -> Mapping[str, Any]:
    """Return a card's metadata; empty if there is none, or none that can be parsed."""
    try:
        if path.stat().st_size > _LARGEST_CARD:
            return {}
        front_matter = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
        values = yaml.safe_load(front_matter[1]) if front_matter else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_plain(value: object) -> bool:
    """Whether a value is a short text, or a list of such."""
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(item, str) and 0 < len(item) <= 200 for item in listed)


def _figures(report: Report) -> str:
    lines = [
        "## Size and quality\n",
        _markdown_table(
            ("", "original", "this model", "change", "measured on"),
            map(_cells, [*size_rows(report), *quality_rows(report)]),
        ),
    ]
    if any(row.measured_on for row in quality_rows(report)):
        lines.append(f"{_INTERVALS}\n")
    if report.gates:
        verdicts = (
            (
                row.name,
                _with_interval(row.value, row.interval),
                row.limit,
                f"{row.verdict}: {row.remedy}" if row.remedy else row.verdict,
            )
            for row in gate_rows(report.gates)
        )
        lines.append("Gates that were set beforehand:\n")
        lines.append(_markdown_table(("", "measured", "at most", ""), verdicts))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _with_interval(row.original, row.original_interval),
        _with_interval(row.compressed, row.compressed_interval),
        _with_interval(row.change, row.change_interval),
        row.measured_on,
    )


def _with_interval(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _stages(report: Report) -> str:
    """Return the stages' tables except the long ones, which only the HTML page shows."""
    short_tables = [table for table in report_tables(report) if not table.is_detail]
    if not short_tables:
        return ""
    return "\n".join(["## What was done\n", *map(_stage_table, short_tables)])


def _stage_table(table: Table) -> str:
    heads = tuple(map(escaped, table.columns))
    is_number = [column in table.numbers for column in table.columns]
    return f"{escaped(table.title)}:\n\n{_markdown_table(heads, table.rows, is_number)}"


def _markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], is_number: Sequence[bool] | None = None
) -> str:
    """Return a table; all columns but the first are aligned to the right unless `is_number` says which."""
    aligned = is_number or [False, *[True] * (len(heads) - 1)]
    lines = [
        "| " + " | ".join(heads) + " |",
        "|" + "|".join("---:" if is_right else "---" for is_right in aligned) + "|",
    ]
    lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _serving(report: Report, path: Path) -> str:
    sizes = tensor_parallel_sizes(report)
    made_for = f" Made for tensor parallel sizes {', '.join(map(str, sizes))}." if len(sizes) > 1 else ""
    plugin = "vLLM reads the format without a plugin."
    if needs_plugin(report):
        plugin = "The package is the plugin, which vLLM finds by itself."
    return (
        "## Serve it with vLLM\n\n"
        + fenced("\n".join(serve_commands(report, _public(path))), "bash")
        + f"\n{plugin}{made_for}{_origin() if needs_plugin(report) else ''}\n"
    )


def _origin() -> str:
    """Return instructions to install the package from a wheel; empty if a package index has it."""
    instructions = where_from()
    return "" if instructions is None else f" {instructions.replace('  ', ' `')}`."


def _public(path: Path) -> str:
    """Return a relative path as it is, of an absolute one only the name: a card is published."""
    return path.name if path.is_absolute() else str(path)


def _loading(report: Report, path: Path) -> str:
    _, model_class = hub_kind(report)
    quoted_path = json.dumps(_public(path), ensure_ascii=False)  # a JSON string is a Python string too
    registering = (
        "import ercsvd_deploy.hf  # registers the format; without it transformers refuses the directory\n"
    )
    stock = stock_format(report)
    package = install_command("compress") if stock is None else f"pip install transformers {stock.package}"
    code = (
        f"{registering if stock is None else ''}"
        f"from transformers import {model_class}\n\n"
        f"model = {model_class}.from_pretrained({quoted_path})"
    )
    return "## Load it in transformers\n\n" + fenced(package, "bash") + "\n" + fenced(code, "python")


def _making(report: Report) -> str:
    recipe = {key: value for key, value in report.recipe.items() if key != "export"}
    text = yaml.safe_dump(_without_folders(recipe), sort_keys=False, allow_unicode=True, width=100)
    return (
        "## How it was made\n\nBy `ercsvd run` with this recipe, every default written out; of absolute "
        "paths the last part is shown.\n\n" + fenced(text, "yaml")
    )


def _without_folders(value: Any) -> Any:
    """Return plain values with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def _limits(report: Report) -> str:
    refusal = "It needs ercsvd-deploy: without it, vLLM and transformers refuse the directory."
    lines = [
        "It answers differently from the original, by as much as the table says on what was measured there; "
        "what was not measured may have suffered more.",
        *([refusal] if needs_plugin(report) else []),
        *_unserved(report),
        *(escaped(warning) for warning in report.warnings),
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _unserved(report: Report) -> list[str]:
    """Return one line that names the tensor-parallel sizes at which vLLM failed; its output is left out."""
    failures = report.serving.failures if report.serving is not None else []
    if not failures:
        return []
    listed = " and ".join(str(failure.tensor_parallel_size) for failure in failures)
    return [f"When it was made, vLLM failed to serve it at tensor-parallel size {listed}: see {REPORT_FILE}."]


def _licence(directory: Path) -> str:
    """Return the card's section on the licence."""
    terms = "## Licence\n\nThat of the original model"
    if (directory / ORIGINAL_CARD_FILE).is_file():
        return f"{terms}, whose own card is in [{ORIGINAL_CARD_FILE}]({ORIGINAL_CARD_FILE}).\n"
    return f"{terms}.\n"
