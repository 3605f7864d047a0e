"""Find the safetensors files of a model's weights in a Hugging Face directory.

These are one file, shards with an index, or a complete set of numbered shards. An ambiguous directory is
refused, because libraries choose differently and would load different models. An index may only name files of
its own directory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ercsvd_deploy.format.files.tensor_store import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    FileStore,
    enumerate_names,
)

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_SUFFIX = ".safetensors"
# Ending of a file name -> kind of a file with weights in another format.
_OTHER_FORMATS: Mapping[str, str] = {
    ".bin": "a pickle",
    ".pt": "a pickle",
    ".pth": "a pickle",
    ".ckpt": "a pickle",
    ".gguf": "a GGUF file, which is quantized already",
    ".distcp": "a part of a distributed checkpoint",
    ".h5": "TensorFlow's",
    ".msgpack": "Flax's",
}
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "vocab.bin")
ADAPTER_CONFIG = "adapter_config.json"


def open_directory(directory: Path) -> FileStore:
    """Open the weights of a Hugging Face model directory.

    Raises:
        CheckpointError: no safetensors weights, two sets of them, a broken index, or an index that points
            elsewhere.
    """
    index_path = directory / INDEX_FILE
    if index_path.is_file():
        weight_map = _read_weight_map(index_path)
        file_names = sorted(set(weight_map.values()))
        files = [_checked(directory, name, index_path) for name in file_names]
        if os.path.lexists(directory / SINGLE_FILE) and SINGLE_FILE not in file_names:
            raise CheckpointError(
                f"{directory}: holds {SINGLE_FILE}, and {INDEX_FILE} that names other files: transformers "
                "would read the one, vLLM the others; remove what is out of date"
            )
        store = FileStore(files)
        missing = sorted(set(weight_map) - store.names())
        if missing:
            raise CheckpointError(f"{index_path}: its files do not hold {enumerate_names(missing)}")
        return store
    if os.path.lexists(directory / SINGLE_FILE):
        return FileStore([_checked(directory, SINGLE_FILE, directory)])
    file_names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    numbered = _numbered_shards(directory, file_names)
    if numbered:
        return FileStore([_checked(directory, name, directory) for name in numbered])
    hint = explain_no_weights(file_names)
    raise CheckpointError(
        f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there" + (f"; {hint}" if hint else "")
    )


def has_weights(file_names: Iterable[str]) -> bool:
    """Whether a model's files, by their names, hold weights that `open_directory` may open."""
    names = set(file_names)
    return not names.isdisjoint({SINGLE_FILE, INDEX_FILE}) or any(map(_NUMBERED.fullmatch, names))


def explain_no_weights(file_names: Iterable[str]) -> str | None:
    """Return why none of a model's files holds readable weights, and what to do.

    Args:
        file_names: Names of all files of its directory.

    Returns:
        None if nothing looks like weights at all.
    """
    names = sorted(set(file_names) - set(_NO_WEIGHTS))
    if ADAPTER_CONFIG in names:
        return f"{ADAPTER_CONFIG} says that this is an adapter: merge it into its base model, and save that"
    other_safetensors = [name for name in names if name.endswith(_SUFFIX)]
    if other_safetensors:
        return (
            f"{other_safetensors[0]} is not a name under which transformers or vLLM would read weights: "
            "save the model with save_pretrained"
        )
    for ending, kind in _OTHER_FORMATS.items():
        file_name = next((name for name in names if name.endswith(ending)), None)
        if file_name is not None:
            return (
                f"{file_name} is {kind}, which is never read: convert it to safetensors, by transformers' "
                "AutoModelForCausalLM.from_pretrained(NAME, dtype='auto').save_pretrained(DIRECTORY), and "
                "save its tokenizer there too"
            )
    return None


def outside_links(store: FileStore, directory: Path) -> dict[str, Path]:
    """Return name -> target of the weight files that are links to files outside a directory.

    The hub cache's own links do not count.
    """
    own_folders = _folders_of(directory)
    targets = {path.name: path.resolve() for path in sorted(store.files())}
    return {name: target for name, target in targets.items() if target.parent not in own_folders}


def _numbered_shards(directory: Path, file_names: Iterable[str]) -> list[str]:
    """Return the numbered shards of a directory without an index; empty if there are none.

    Raises:
        CheckpointError: shards are missing, or there are several sets of them.
    """
    sets: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, file_names)):
        sets.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    if not sets:
        return []
    if len(sets) > 1:
        listed = enumerate_names(f"{stem}-...-of-{count:05d}" for stem, count in sets)
        raise CheckpointError(f"{directory}: holds several sets of shards ({listed}), and no {INDEX_FILE}")
    [((stem, count), numbers)] = sets.items()
    names = [f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]
    absent = [name for number, name in enumerate(names, start=1) if number not in numbers]
    if absent:
        raise CheckpointError(
            f"{directory}: {enumerate_names(absent)} of {count} shards missing; is the download complete?"
        )
    return names


def _read_weight_map(index_path: Path) -> dict[str, str]:
    """Return tensor name -> file name of an index file."""
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_path}: not readable JSON ({error})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map")
    if not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    return weight_map


def _checked(directory: Path, file_name: str, named_by: Path) -> Path:
    """Return the path of `file_name` in `directory` if it may be read.

    Users link to weights elsewhere to try another config: links that keep a file's name, or that have a
    standard name of weights, are followed. A link under a name that only an index contains is refused,
    because it could make any readable file part of the model.
    """
    is_plain = Path(file_name).name == file_name and file_name.isprintable()
    if not is_plain or not file_name.endswith(_SUFFIX):
        raise CheckpointError(f"{named_by}: {file_name!r} is not the name of a safetensors file beside it")
    path = directory / file_name
    try:
        target = path.resolve()
        if path.is_symlink() and not target.exists():
            raise CheckpointError(f"{path}: is a link to {target}, which is not there")
        if target.exists() and not target.is_file():  # opening a pipe would wait for a writer
            raise CheckpointError(f"{path}: not a complete safetensors file, but a folder, pipe or device")
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise CheckpointError(f"{path}: cannot be opened ({error})") from error
    if target.parent in _folders_of(directory):
        return path
    is_standard = file_name == SINGLE_FILE or _NUMBERED.fullmatch(file_name) is not None
    if not (is_standard or file_name in _names_along_link(path)):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside the model directory; a link to weights elsewhere must "
            "have the name of its file"
        )
    return path


def is_followed(path: Path, directory: Path) -> bool:
    """Whether a file of a model may be read: no link, a link within the model, or one that keeps the name.

    An unpacked archive can contain a link under any name to any file of this machine; a user's own link to
    the same file of another model keeps that file's name.
    """
    if not path.is_symlink():
        return True
    folders = _folders_of(directory)
    return not folders.isdisjoint(path.resolve().parents) or path.name in _names_along_link(path)


def _folders_of(directory: Path) -> frozenset[Path]:
    """Return the resolved folders in which a model's files lie: its own, and the hub cache's `blobs`."""
    resolved = directory.resolve()
    folders = {resolved}
    if resolved.parent.name == "snapshots":  # the hub cache: snapshots/<revision> -> ../../blobs
        folders.add((resolved.parent.parent / "blobs").resolve())
    return frozenset(folders)


def _names_along_link(link: Path) -> frozenset[str]:
    """Return the file names along a chain of links; the last may be that of a blob in a hub cache."""
    names: set[str] = set()
    while link.is_symlink() and len(names) < 40:  # Linux follows at most 40 links
        link = link.parent / link.readlink()
        names.add(link.name)
    return frozenset(names)
