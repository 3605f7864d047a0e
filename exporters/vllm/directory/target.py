"""Check whether an export may be written to a directory. No torch at import."""

from __future__ import annotations

import json
from pathlib import Path

from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS

CONFIG_FILE = "config.json"
_MAX_LISTED = 5


class ExportError(ValueError):
    """The export cannot be written to the directory that the recipe gives."""


def check_target(target: Path, source: Path) -> None:
    """Refuse a target that would overwrite something, before any work is done.

    Raises:
        ExportError: the target exists and is not an earlier export, lies inside the source model, or contains
            it.
    """
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise ExportError(f"output {target} lies inside the source model {source}: choose another directory")
    if target.resolve() in source.resolve().parents:
        raise ExportError(
            f"output {target} would replace the source model {source}: choose another directory"
        )
    if target.is_mount():
        raise ExportError(
            f"output {target} is a mount point, which cannot be replaced: choose a directory in it"
        )
    if target.is_symlink():
        raise ExportError(
            f"output {target} is a link, which a finished directory would replace: give {target.resolve()}"
        )
    if target.exists() and not is_export(target):
        raise ExportError(
            f"output {target} exists and is not an earlier export of this tool: remove it or choose another"
        )
    parents = [target.absolute(), *target.absolute().parents]
    nearest_parent = next(parent for parent in parents if parent.exists())
    if target.absolute() != nearest_parent and not nearest_parent.is_dir():
        raise ExportError(f"output {target} cannot be created: {nearest_parent} is a file")


def check_unchanged(target: Path, *, with_weights: bool = True) -> None:
    """Refuse to replace an export whose files somebody has changed.

    Files that no export has written are not checked: they are kept.

    Args:
        target: The directory of the export.
        with_weights: Whether to compare tensors too, which reads all of them.

    Raises:
        ExportError: files or tensors differ from the manifest, or there is no manifest.
    """
    from ercsvd_deploy.format.files.manifest import ManifestError, changed_files

    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        changed = changed_files(target, with_weights=with_weights)
    except ManifestError as error:
        raise ExportError(
            f"output {target} would be replaced, but what of it was exported is not known ({error}): move it "
            "away, choose another output, or replace it with --force"
        ) from error
    if changed:
        rest = f"\n  and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
        listed = "\n  ".join(changed[:_MAX_LISTED])
        raise ExportError(
            f"output {target} would be replaced, but somebody has changed it:\n  {listed}{rest}\n"
            "move it away, choose another output, or replace it with --force"
        )


def is_export(directory: Path) -> bool:
    """Whether a directory may be replaced by a new export: it is an earlier export, or empty."""
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        if config["quantization_config"]["quant_method"] in STOCK_FORMATS:
            from ercsvd_deploy.format.files.manifest import MANIFEST_FILE  # needs torch

            return (directory / MANIFEST_FILE).is_file()  # others write this format too
        CheckpointConfig.read(config["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
