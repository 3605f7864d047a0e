"""What files of text datasets are called."""

from __future__ import annotations

from collections.abc import Mapping

# Form of a dataset, as recipes name it -> the files of a folder that belong to it.
DATA_FILES: Mapping[str, tuple[str, ...]] = {
    "text": ("*.txt", "*.txt.gz", "*.md"),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz"),
    "parquet": ("*.parquet",),
}
