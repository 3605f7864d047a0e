"""Results of the tests that compress models of each family and serve them with vLLM.

`tested_families.json` beside this file is written by the tests themselves (`make test-families`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

FILE = "tested_families.json"
NOT_RUN = "vLLM does not run the original"  # beginning of a result that is no fault of the export
TWO_RANKS = " at two ranks"  # end of a kind of export that was served with tensor parallelism
# Served by the tests in `tests/vllm`, at several tensor parallel sizes and with every storage.
_ELSEWHERE = frozenset({"llama", "mistral", "qwen2", "qwen3", "opt", "llava", "llava_next"})


def read_results() -> Mapping[str, Mapping[str, str]]:
    """Return the result of every export, by family (`TYPE` or `TYPE-VARIANT`) and kind of export.

    A kind of export is a dtype; for vision-language models also a dtype `with pictures`; each of these also
    `at two ranks` of tensor parallelism.
    """
    text = files("ercsvd_deploy.models.description").joinpath(FILE).read_text(encoding="utf-8")
    results: Mapping[str, Mapping[str, str]] = json.loads(text)
    return results


def family_warnings(model_type: str) -> list[str]:
    """Return warnings if no test has served a family with vLLM, or if vLLM is known not to run it."""
    if model_type in _ELSEWHERE:
        return []
    results = [
        result_by_export
        for name, result_by_export in read_results().items()
        if name.partition("-")[0] == model_type
    ]
    if not results:
        return [
            f"no test has served a compressed model of type {model_type} with vLLM: set "
            "gates.serving_parity, and look at what it finds before you rely on the export"
        ]
    verdicts = sorted(
        {
            f"{' '.join([model_type, *export.split()[1:]])}: {verdict}"
            for result_by_export in results
            for export, verdict in result_by_export.items()
            if verdict.startswith(NOT_RUN) and not _is_known_of_one_rank(export, result_by_export)
        }
    )
    return [f"models of type {verdict}" for verdict in verdicts]


def _is_known_of_one_rank(export: str, results: Mapping[str, str]) -> bool:
    """Whether a result is about two ranks, and vLLM does not run the original on one either."""
    one_rank = export.removesuffix(TWO_RANKS)
    return one_rank != export and results.get(one_rank, "").startswith(NOT_RUN)
