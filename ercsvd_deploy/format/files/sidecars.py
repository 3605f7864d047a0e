"""The sidecar files of a model, copied with its weights: tokenizer, processor, templates, licence.

Weights in other formats are not copied: `consolidated.safetensors` could be loaded instead of the model, and
a pickle can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ercsvd_deploy.format.files.weight_files import is_followed

# Patterns of file names in lower case.
_LICENCES = ("*licen[cs]e*", "copying*")
_NOTICES = ("notice*", "use_policy*", "copyright*")
_FILES = (
    "tokenizer*",
    "tekken*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "sentencepiece*",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "*.py",  # runs only with `trust_remote_code`, as in the original
    *_LICENCES,
    *_NOTICES,
)
_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"  # sentence-transformers' list of the folders of further modules
_NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
_MOST_MODULES = 64


def sidecars(directory: Path) -> dict[str, Path]:
    """Return the files of an original model that an export copies unchanged.

    Returns:
        Path within the export, in POSIX form -> file.
    """
    files = {path.name: path for path in _matching(directory, _FILES)}
    for folder in (_TEMPLATES, *_module_folders(directory)):
        files |= dict(_files_below(directory / folder, directory))
    return files


def licences(directory: Path, *, with_notices: bool = False) -> list[str]:
    """Return the names of a model's licence files, and of its notices if `with_notices`.

    Empty if the directory does not exist.
    """
    if not directory.is_dir():
        return []
    patterns = (*_LICENCES, *_NOTICES) if with_notices else _LICENCES
    return [path.name for path in _matching(directory, patterns)]


def _matching(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield the directory's own files whose names match a pattern, except weights."""
    for path in sorted(directory.iterdir()):
        is_named = any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns)
        is_weights = _is_weights(path.name) or path.suffix == ".safetensors"
        if is_named and not is_weights and path.is_file() and is_followed(path, directory):
            yield path


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_NEVER)


def _module_folders(directory: Path) -> Iterator[str]:
    """Yield the folders that `modules.json` names, such as `1_Pooling`, if they lie in the directory."""
    try:
        modules = json.loads((directory / _MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for module in (modules if isinstance(modules, list) else [])[:_MOST_MODULES]:
        folder = module.get("path") if isinstance(module, Mapping) else None
        if isinstance(folder, str) and folder.isprintable() and Path(folder).name == folder:
            yield folder


def _files_below(folder: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder of the directory; links that lead outside are not followed."""
    if not folder.is_dir() or directory.resolve() not in folder.resolve().parents:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path, directory)
        elif path.is_file() and not _is_weights(path.name) and is_followed(path, directory):
            yield path.relative_to(directory).as_posix(), path
