"""Rows of text datasets in the usual forms: JSON lines, parquet, saved `datasets` folders, the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from ercsvd_deploy.data.texts import CalibrationError, first_line
from ercsvd_deploy.format.files.data_files import DATA_FILES

_ROWS_AT_ONCE = 256  # of a parquet file

Row = tuple[str, Mapping[str, Any]]  # its place for error messages, and its cells by column


def files_of(path: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the file itself, or the files in a folder that match one of the patterns, sorted by path.

    Raises:
        CalibrationError: the folder has no such file.
    """
    if not path.is_dir():
        return [path]
    files = sorted({file for pattern in patterns for file in path.rglob(pattern) if file.is_file()})
    if not files:
        raise CalibrationError(f"{path}: the folder has no file named {', '.join(patterns)}")
    return files


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 file, compressed if its name ends in .gz; a byte order mark is skipped."""
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8-sig"))
    return path.open(encoding="utf-8-sig")


def read_text(path: Path, max_characters: int | None = None) -> str:
    """Return the beginning of a UTF-8 text file, or of the text files of a folder, joined by blank lines.

    Raises:
        CalibrationError: missing, not UTF-8, or blank.
    """
    texts: list[str] = []
    remaining = max_characters
    for file in files_of(path, DATA_FILES["text"]):
        if remaining is not None and remaining <= 0:
            break
        try:
            with open_text(file) as stream:
                texts.append(stream.read(-1 if remaining is None else remaining))
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{file}: cannot be read as UTF-8 text ({error})") from error
        if remaining is not None:
            remaining -= len(texts[-1])
    text = "\n\n".join(texts)
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty")
    return text


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a file of JSON lines, or of all such files of a folder.

    Raises:
        CalibrationError: a file cannot be read, or a line is not a JSON object; the message names the line.
    """
    for file in files_of(path, DATA_FILES["jsonl"]):
        try:
            with open_text(file) as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{file}:{number}", _object(line, f"{file}:{number}")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise CalibrationError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: is {type(row).__name__}; each line is a JSON object")
    return row


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file, or of all parquet files of a folder.

    Raises:
        CalibrationError: pyarrow is not installed, or a file cannot be read.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(f"{path}: needs the hub extra: pip install 'ercsvd-deploy[hub]'") from None
    for file in files_of(path, DATA_FILES["parquet"]):
        num_rows = 0
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        num_rows += 1
                        yield f"{file}: row {num_rows}", row
        except (OSError, ArrowException) as error:
            raise CalibrationError(f"{file}: cannot be read as parquet ({first_line(error)})") from error


def saved_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Yield the rows of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Args:
        path: The folder.
        split: Name of the split of a `DatasetDict`; None: its only one, or "train".

    Raises:
        CalibrationError: the `hub` extra is not installed, or the folder or split is not there.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise CalibrationError(f"{path}: needs the hub extra: pip install 'ercsvd-deploy[hub]'") from None
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{path}: no folder that `save_to_disk` of datasets wrote ({first_line(error)})"
        ) from error
    if isinstance(dataset, DatasetDict):
        name = split or (next(iter(dataset)) if len(dataset) == 1 else "train")
        if name not in dataset:
            raise CalibrationError(f"{path}: no split {name!r}; it has: {', '.join(dataset)}")
        dataset = dataset[name]
    elif split is not None:
        raise CalibrationError(f"{path}: holds one dataset without splits: remove split {split!r}")
    for number, row in enumerate(dataset, start=1):
        yield f"{path}: row {number}", row


def hub_rows(name: str, *, config: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """Yield the rows of a hub dataset, streamed.

    Raises:
        CalibrationError: the `hub` extra is not installed, or there is no such dataset.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"dataset {name} of the hub: needs the hub extra: pip install 'ercsvd-deploy[hub]'"
        ) from None
    try:
        rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name}: row {number}", row
    except (OSError, ValueError) as error:
        raise CalibrationError(f"dataset {name} of the hub: {error}") from error
