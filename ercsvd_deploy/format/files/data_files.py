"""The forms of text datasets, recognised by file names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

# Form of a dataset, as recipes name it -> the files of a folder that belong to it.
DATA_FILES: Mapping[str, tuple[str, ...]] = {
    "text": ("*.txt", "*.txt.gz", "*.md"),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz"),
    "parquet": ("*.parquet",),
}
_SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")  # in a folder that `save_to_disk` of datasets wrote


def forms_of(path: Path) -> Iterator[str]:
    """Yield the forms in which a file, or the files of a folder, may be by their names."""
    if any((path / mark).is_file() for mark in _SAVED_MARKS):
        yield "saved"
    for form, patterns in DATA_FILES.items():
        for pattern in patterns:
            if any(path.rglob(pattern)) if path.is_dir() else fnmatch(path.name.lower(), pattern):
                yield form
                break
