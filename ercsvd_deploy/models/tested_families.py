"""Which families have been compressed and served with vLLM by the tests, and with what result.

`tested_families.json` beside this file is written by the tests themselves (`make test-families`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

FILE = "tested_families.json"
NOT_RUN = "vLLM does not run the original"  # how a result begins that is no fault of ours
# Served by tests of their own (`tests/vllm`), at several tensor parallel sizes and with every storage.
_ELSEWHERE = frozenset({"llama", "mistral", "qwen2", "qwen3", "opt", "llava", "llava_next"})


def read_results() -> Mapping[str, Mapping[str, str]]:
    """Return what came of every family: `TYPE` or `TYPE-VARIANT` -> what was tried -> a few words.

    Tried is an export of one dtype, of a vision-language model also `with pictures`.
    """
    text = files("ercsvd_deploy.models").joinpath(FILE).read_text(encoding="utf-8")
    results: Mapping[str, Mapping[str, str]] = json.loads(text)
    return results


def serving_doubts(model_type: str) -> list[str]:
    """Return a sentence if nobody knows that vLLM serves a family, or it is known that it does not."""
    if model_type in _ELSEWHERE:
        return []
    results = [found for name, found in read_results().items() if name.partition("-")[0] == model_type]
    if not results:
        return [
            f"no test has served a compressed model of type {model_type} with vLLM: set "
            "gates.serving_parity, and look at what it finds before you rely on the export"
        ]
    verdicts = sorted(
        {
            f"{model_type}{' with pictures' * tried.endswith('with pictures')}: {verdict}"
            for found in results
            for tried, verdict in found.items()
            if verdict.startswith(NOT_RUN)
        }
    )
    return [f"models of type {each}" for each in verdicts]
