"""Tasks for lm-eval, made from text of this repository, in the YAML that its users write."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

TEXT = Path(__file__).parents[2] / "examples" / "text" / "in_domain.txt"
NUM_DOCUMENTS = 24
_CONTEXT, _CONTINUATION = 24, 8  # words


def documents(seed: int = 0) -> list[dict[str, Any]]:
    """Return places of a text, each with its own continuation among those of others."""
    words = re.findall(r"\S+", TEXT.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    starts = rng.sample(range(0, len(words) - 64, 40), NUM_DOCUMENTS)
    continuations = [" ".join(words[start + _CONTEXT : start + _CONTEXT + _CONTINUATION]) for start in starts]
    found = []
    for place, start in enumerate(starts):
        others = rng.sample([index for index in range(len(starts)) if index != place], 3)
        choices = [continuations[place], *(continuations[other] for other in others)]
        rng.shuffle(choices)
        found.append(
            {
                "context": " ".join(words[start : start + _CONTEXT]),
                "choices": choices,
                "answer": choices.index(continuations[place]),
                "next_word": words[start + _CONTEXT],
            }
        )
    return found


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write `which_continuation`, `next_word` and one without data; return the documents of the first two."""
    folder.mkdir(exist_ok=True)
    data = folder / "documents.json"
    asked = documents()
    data.write_text("\n".join(map(json.dumps, asked)) + "\n")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    tasks = [
        {
            "task": "which_continuation",
            **source,
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        {
            "task": "next_word",
            **source,
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{next_word}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "filter_list": [
                {
                    "name": "strict-match",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"^ ?(\S+) "},
                        {"function": "take_first"},
                    ],
                },
                {
                    "name": "flexible-extract",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(\w+)"},
                        {"function": "take_first"},
                    ],
                },
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        {
            "task": "without_data",
            **source,
            "dataset_kwargs": {"data_files": {"test": str(folder / "absent.json")}},
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{next_word}}",
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            # It loads, and fails when it is asked: `{{answer / 0}}` is computed for every document.
            "task": "fails_when_asked",
            **source,
            "output_type": "generate_until",
            "doc_to_text": "{{answer / 0}}",
            "doc_to_target": "{{next_word}}",
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            "task": "rolling",
            **source,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return asked
