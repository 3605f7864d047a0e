"""Which files of a model's directory are served with its weights: tokenizer, processor, templates, licence.

Weights in another form are not among them: `consolidated.safetensors` would be taken for the model, and a
pickle runs what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ercsvd_deploy.format.weight_files import is_followed

# Of file names in lower case.
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
    "*.py",  # runs only where `trust_remote_code` is given, as that of the original does
    *_LICENCES,
    *_NOTICES,
)
_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"  # of sentence-transformers: which folders stand behind the model
_NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
_MOST_MODULES = 64


def sidecars(directory: Path) -> dict[str, Path]:
    """Return what of an original model's directory comes into an export as it is.

    Returns:
        Path within the export, in POSIX form -> file.
    """
    files = {path.name: path for path in _named(directory, _FILES)}
    for folder in (_TEMPLATES, *_module_folders(directory)):
        files |= dict(_files_below(directory / folder, directory))
    return files


def licences(directory: Path, *, with_notices: bool = False) -> list[str]:
    """Return the names of a model's licence files, and of what goes with them if asked for.

    A directory that is not there has none.
    """
    if not directory.is_dir():
        return []
    patterns = (*_LICENCES, *_NOTICES) if with_notices else _LICENCES
    return [path.name for path in _named(directory, patterns)]


def _named(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of the directory itself, no weights, that have a name of one of these patterns."""
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
    """Yield the files of a folder of the directory, and of folders in it; none behind a link to elsewhere."""
    if not folder.is_dir() or directory.resolve() not in folder.resolve().parents:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path, directory)
        elif path.is_file() and not _is_weights(path.name) and is_followed(path, directory):
            yield path.relative_to(directory).as_posix(), path
